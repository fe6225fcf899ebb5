// How the library was built and what this processor can do; see csrc/minidiff_fast.h.
#include "minidiff_fast.h"

#include <cstdint>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define MINIDIFF_FAST_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace {

#if defined(MINIDIFF_FAST_X86)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (static_cast<std::uint32_t>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = out[0], r.ebx = out[1], r.ecx = out[2], r.edx = out[3];
#else
  if (__get_cpuid_max(0, nullptr) < leaf) return r;
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
#endif
  return r;
}

// Which register files the operating system saves: AVX needs bits 1-2, AVX-512 also bits 5-7.
std::uint64_t extended_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

std::vector<std::string> cpu_features() {
  const auto bit = [](std::uint32_t word, int n) { return ((word >> n) & 1u) != 0; };
  const Registers one = cpuid(1, 0);
  const Registers seven = cpuid(7, 0);
  const Registers seven_one = seven.eax >= 1 ? cpuid(7, 1) : Registers{};
  const std::uint64_t state = bit(one.ecx, 27) ? extended_state() : 0;
  const bool avx = (state & 0x6) == 0x6 && bit(one.ecx, 28);
  const bool avx512 = (state & 0xe6) == 0xe6 && bit(seven.ebx, 16);

  std::vector<std::string> features;
  const auto add = [&features](bool present, const char* name) {
    if (present) features.emplace_back(name);
  };
  add(bit(one.ecx, 20), "sse4_2");
  add(avx, "avx");
  add(avx && bit(seven.ebx, 5), "avx2");
  add(avx && bit(one.ecx, 12), "fma");
  add(avx && bit(one.ecx, 29), "f16c");
  add(avx512, "avx512f");
  add(avx512 && bit(seven.ebx, 30), "avx512bw");
  add(avx512 && bit(seven.ebx, 31), "avx512vl");
  add(avx512 && bit(seven.ecx, 11), "avx512_vnni");
  add(avx512 && bit(seven_one.eax, 5), "avx512_bf16");
  return features;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

std::vector<std::string> cpu_features() { return {"neon"}; }  // part of every 64-bit ARM

#else

std::vector<std::string> cpu_features() { return {}; }

#endif

const char* cpu_architecture() {
#if defined(__x86_64__) || defined(_M_X64)
  return "x86_64";
#elif defined(__i386__) || defined(_M_IX86)
  return "x86";
#elif defined(__aarch64__) || defined(_M_ARM64)
  return "aarch64";
#elif defined(__powerpc64__)
  return "ppc64";
#elif defined(__riscv)
  return "riscv";
#else
  return "other";
#endif
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

std::string list(const std::vector<std::string>& items) {
  std::string out = "[";
  for (const std::string& item : items) {
    if (out.size() > 1) out += ", ";
    out += quoted(item);
  }
  return out + "]";
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> items;
  std::size_t begin = 0;
  while (begin < text.size()) {
    std::size_t end = text.find(',', begin);
    if (end == std::string::npos) end = text.size();
    if (end > begin) items.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return items;
}

std::string describe() {
#if defined(_OPENMP)
  const bool openmp = true;
  const int threads = omp_get_max_threads();
#else
  const bool openmp = false;
  const int threads = 1;
#endif
  const bool cuda = MINIDIFF_FAST_WITH_CUDA != 0;
  return "{\"abi_version\": " + std::to_string(MINIDIFF_FAST_ABI_VERSION) +
         ", \"compiler\": " + quoted(MINIDIFF_FAST_COMPILER) + ", \"openmp\": " + (openmp ? "true" : "false") +
         ", \"max_threads\": " + std::to_string(threads) + ", \"cpu\": {\"architecture\": " +
         quoted(cpu_architecture()) + ", \"features\": " + list(cpu_features()) +
         "}, \"cuda\": {\"compiled\": " + (cuda ? "true" : "false") +
         ", \"compiler\": " + (cuda ? quoted(MINIDIFF_FAST_CUDA_COMPILER) : std::string("null")) +
         ", \"architectures\": " + list(split(MINIDIFF_FAST_CUDA_ARCHITECTURES)) + "}}";
}

}  // namespace

extern "C" int minidiff_fast_abi_version(void) { return MINIDIFF_FAST_ABI_VERSION; }

extern "C" const char* minidiff_fast_build_info(void) {
  static const std::string text = describe();
  return text.c_str();
}

extern "C" int minidiff_fast_has_cuda(void) { return MINIDIFF_FAST_WITH_CUDA; }
