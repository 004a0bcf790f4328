// How a function is declared that host and device share.
#pragma once

#if defined(__CUDACC__)
#define DEQCORE_HD static __host__ __device__ __forceinline__
#define DEQCORE_HD_ALWAYS DEQCORE_HD
#else
// Internal linkage: kernels include these once per instruction set, each with its own flags.
#define DEQCORE_HD [[maybe_unused]] static inline
// For what a vectorised loop calls for each number.
#define DEQCORE_HD_ALWAYS [[maybe_unused, gnu::always_inline]] static inline
#endif
