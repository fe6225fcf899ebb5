// Which instruction set this processor allows; see CMakeLists.txt for the files that are compiled for AVX2.
#ifndef MINIDIFF_FAST_CPU_DISPATCH_H
#define MINIDIFF_FAST_CPU_DISPATCH_H

// Whether the functions of the *_avx2.cpp files are in the library and may run here.
inline bool minidiff_fast_runs_avx2() {
#if MINIDIFF_FAST_WITH_AVX2
  static const bool runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs;
#else
  return false;
#endif
}

#endif  // MINIDIFF_FAST_CPU_DISPATCH_H
