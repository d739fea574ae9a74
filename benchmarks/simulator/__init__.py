"""A kernel's time from its machine code, on a Hopper GPU that is not there: simulated, never measured.

decode.py: stall counts and barriers of each instruction; warp.py: the path that one warp takes through them, and the
tensor that each access goes to; kernels.py: a block's launches, compiled once; machine.py, core.c: one multiprocessor
and its share of programs and of memory, and what the model leaves out; assumed.py: what is not ours to compile.
"""
