// What PyTorch asks of CUDA as a whole, for a device that is not there: it exists, and there is one. Built and loaded by
// preload.py before PyTorch, whose own answer, if it has one, then stays unused.
#include <ATen/detail/CUDAHooksInterface.h>

// Whether it has cuDNN's operators: operators.cpp brings them.
extern "C" bool rehearsal_cudnn;
bool rehearsal_cudnn = false;

namespace {

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool hasCuDNN() const override { return rehearsal_cudnn; }
  bool compiledWithCuDNN() const override { return rehearsal_cudnn; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return rehearsal_cudnn; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return rehearsal_cudnn; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return rehearsal_cudnn; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  double batchnormMinEpsilonCuDNN() const override { return 0.0; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, Hooks)

}  // namespace
