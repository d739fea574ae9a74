// PyTorch's operators for a device that is not there: each makes its results (sizes, strides, dtype, memory of the
// host's) and computes nothing, so that a call costs Python, the dispatcher, autograd and the allocations. They are those
// of a block's forward and backward, eager's and ours; another one ends in PyTorch's error, which names it. Built by
// preload.py, loaded after PyTorch.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/result_type_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <unordered_map>

using at::IntArrayRef;
using at::MemoryFormat;
using at::OptionalIntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
using std::optional;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Maybe = const optional<Tensor>&;

namespace {

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

// Freed blocks wait by their size, as a GPU's do: none is given back, and none is new after the first call.
struct Block {
  void* data;
  Block** home;
  Block* next;
};

std::mutex lock;

void give_back(void* context) {
  std::lock_guard<std::mutex> guard(lock);
  Block* block = static_cast<Block*>(context);
  block->next = *block->home;
  *block->home = block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (std::max<size_t>(bytes, 1) + 511) / 512 * 512;
    std::lock_guard<std::mutex> guard(lock);
    Block*& free = blocks[size];
    if (free == nullptr) free = new Block{std::aligned_alloc(512, size), &free, nullptr};
    Block* block = std::exchange(free, free->next);
    return {block->data, block, give_back, c10::Device(c10::DeviceType::CUDA, 0)};
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  std::unordered_map<size_t, Block*> blocks;  // its values stay where they are
};

Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory)

Tensor make(IntArrayRef size, ScalarType type, optional<MemoryFormat> format = std::nullopt) {
  return at::detail::empty_generic(size, &memory, KEYS, type, format);
}

Tensor make_strided(IntArrayRef size, IntArrayRef stride, ScalarType type) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, type);
}

// A result of this operand's size, in its order of axes.
Tensor like(const Tensor& x, ScalarType type) {
  return x.is_non_overlapping_and_dense() ? make_strided(x.sizes(), x.strides(), type) : make(x.sizes(), type);
}

Tensor same(const Tensor& x) { return like(x, x.scalar_type()); }

Tensor empty(
    IntArrayRef size, optional<ScalarType> type, optional<c10::Layout>, optional<c10::Device>, optional<bool>,
    optional<MemoryFormat> format) {
  return make(size, c10::dtype_or_default(type), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, optional<ScalarType> type, optional<c10::Layout>, optional<c10::Device>,
    optional<bool>) {
  return make_strided(size, stride, c10::dtype_or_default(type));
}

// One or two operands, elementwise.
Tensor pair(const Tensor& a, const Tensor& b) {
  const ScalarType type = a.scalar_type() == b.scalar_type() ? a.scalar_type() : at::native::result_type(a, b);
  if (a.dim() >= b.dim() && (b.dim() == 0 || a.sizes() == b.sizes())) return like(a, type);
  const auto size = at::infer_size_dimvector(a.sizes(), b.sizes());
  if (a.sizes() == IntArrayRef(size)) return like(a, type);
  return b.sizes() == IntArrayRef(size) ? like(b, type) : make(size, type);
}

Tensor add(const Tensor& a, const Tensor& b, const Scalar&) { return pair(a, b); }

template <typename... Rest>
Tensor& keep(Tensor& x, Rest...) {
  return x;
}

// Products and sums.
Tensor product(const Tensor& a, const Tensor& b) { return make({a.size(0), b.size(1)}, a.scalar_type()); }
Tensor wide_product(const Tensor& a, const Tensor& b, ScalarType type) { return make({a.size(0), b.size(1)}, type); }
Tensor sum_product(const Tensor&, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  return product(a, b);
}
Tensor& product_out(const Tensor&, const Tensor&, Tensor& out) { return out; }
Tensor& wide_product_out(const Tensor&, const Tensor&, ScalarType, Tensor& out) { return out; }
Tensor& sum_product_out(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&, Tensor& out) {
  return out;
}

Tensor reduce(const Tensor& x, OptionalIntArrayRef axes, bool keepdim, optional<ScalarType> type) {
  const int64_t dims = x.dim();
  c10::SmallVector<bool, 8> summed(dims, !axes.has_value() || axes->empty());
  for (int64_t axis : axes.value_or(IntArrayRef())) summed[axis < 0 ? axis + dims : axis] = true;
  at::DimVector size;
  for (int64_t axis = 0; axis < dims; ++axis)
    if (!summed[axis]) size.push_back(x.size(axis));
    else if (keepdim) size.push_back(1);
  return make(size, type.value_or(x.scalar_type()));
}

Tensor cat(const at::ITensorListRef& tensors, int64_t axis) {
  const auto parts = tensors.materialize();
  const Tensor& first = parts.front();
  at::DimVector size(first.sizes());
  int64_t& joined = size[axis < 0 ? axis + first.dim() : axis];
  joined = 0;
  for (const Tensor& part : parts) joined += part.size(axis);
  return make(size, first.scalar_type());
}

// cuDNN's convolution: the one that a PyTorch for CUDA takes for images in channels_last.
Tensor convolution(
    const Tensor& x, const Tensor& weight, IntArrayRef padding, IntArrayRef stride, IntArrayRef dilation, int64_t, bool,
    bool, bool) {
  const auto size = at::native::conv_output_size(x.sizes(), weight.sizes(), padding, stride, dilation);
  return make(size, x.scalar_type(), at::native::cudnn_conv_suggest_memory_format(x, weight));
}

std::tuple<Tensor, Tensor> cudnn_backward(
    const Tensor& x, const Tensor&, const Tensor& weight, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, bool, bool,
    bool, std::array<bool, 2> wanted) {
  const auto format = at::native::cudnn_conv_suggest_memory_format(x, weight);
  return {
      wanted[0] ? make(x.sizes(), x.scalar_type(), format) : Tensor(),
      wanted[1] ? make(weight.sizes(), weight.scalar_type(), format) : Tensor()};
}

// BatchNorm: PyTorch's own, and cuDNN's.
ScalarType wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Three batch_norm(const Tensor& x, Maybe, Maybe, Maybe, Maybe, bool training, double, double) {
  const int64_t channels = training ? x.size(1) : 0;
  return {same(x), make({channels}, wide(x)), make({channels}, wide(x))};
}

Three batch_norm_backward(
    const Tensor&, const Tensor& x, Maybe weight, Maybe, Maybe, Maybe, Maybe, bool, double,
    std::array<bool, 3> wanted) {
  const ScalarType type = weight.has_value() && weight->defined() ? weight->scalar_type() : wide(x);
  const auto vector = [&](bool want) { return want ? make({x.size(1)}, type) : Tensor(); };
  return {wanted[0] ? same(x) : Tensor(), vector(wanted[1]), vector(wanted[2])};
}

Four cudnn_batch_norm(const Tensor& x, const Tensor&, Maybe, Maybe, Maybe, bool training, double, double) {
  const int64_t channels = training ? x.size(1) : 0;
  return {same(x), make({channels}, wide(x)), make({channels}, wide(x)), make({0}, at::kByte)};
}

Three cudnn_batch_norm_backward(
    const Tensor& x, const Tensor&, const Tensor& weight, Maybe, Maybe, Maybe, Maybe, double, const Tensor&) {
  const auto vector = [&] { return make({x.size(1)}, weight.scalar_type()); };
  return {same(x), vector(), vector()};
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, IntArrayRef)>(at::native::view));
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("copy_", keep<const Tensor&, bool>);
  m.impl("fill_.Scalar", keep<const Scalar&>);
  m.impl("fill_.Tensor", keep<const Tensor&>);
  m.impl("zero_", keep<>);
  m.impl("bernoulli_.float", keep<double, optional<at::Generator>>);
  m.impl("_local_scalar_dense", [](const Tensor&) { return Scalar(0); });
  m.impl("_foreach_add_.Scalar", [](at::TensorList, const Scalar&) {});
  for (const char* name : {"silu", "sigmoid", "relu"}) m.impl(name, same);
  for (const char* name : {"mul.Tensor", "div.Tensor", "silu_backward", "sigmoid_backward"}) m.impl(name, pair);
  for (const char* name : {"add.Tensor", "sub.Tensor"}) m.impl(name, add);
  for (const char* name : {"mul_.Tensor", "div_.Tensor"}) m.impl(name, keep<const Tensor&>);
  for (const char* name : {"add_.Tensor", "sub_.Tensor"}) m.impl(name, keep<const Tensor&, const Scalar&>);
  m.impl("mm", product);
  m.impl("mm.out", product_out);
  m.impl("mm.dtype", wide_product);
  m.impl("mm.dtype_out", wide_product_out);
  m.impl("addmm", sum_product);
  m.impl("addmm.out", sum_product_out);
  m.impl("mean.dim", reduce);
  m.impl("sum.dim_IntList", reduce);
  m.impl("cat", cat);
  m.impl("cudnn_convolution", convolution);
  m.impl("native_batch_norm", batch_norm);
  m.impl("native_batch_norm_backward", batch_norm_backward);
  m.impl("cudnn_batch_norm", cudnn_batch_norm);
  m.impl("cudnn_batch_norm_backward", cudnn_batch_norm_backward);
}

}  // namespace

namespace at::native {
REGISTER_CUDA_DISPATCH(cudnn_convolution_backward_stub, &cudnn_backward)
}  // namespace at::native
