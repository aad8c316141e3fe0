// Marks the few small functions that the operators, the CPU kernels and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define KELIX_HOST_DEVICE __host__ __device__
#else
#define KELIX_HOST_DEVICE
#endif
