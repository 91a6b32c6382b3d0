"""Calls that are prepared once and then only launched.

    later     a tensor that is not there yet: layout and origin, no memory
    tape      the launches of one call, written down by running its code on such tensors; or done at once, on real ones
    memory    which buffers of a tape share memory, when large ones come and go
    packing   a launch as the driver takes it: compiled kernel, arguments laid out, tensor maps
    driver    the CUDA driver, by ctypes
    plan      a tape ready to run: pointers are put in place, kernels are launched
    plans     plans by the layout of their operands

The code that launches kernels is written once. On tensors it launches them, as everywhere; on `later.Later` it is recorded. What a call
of a known layout still does is to look the plan up, allocate, write pointers that changed, and hand each kernel to the driver.
"""
