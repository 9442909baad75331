// Selects at run time among versions of a kernel compiled for several instruction sets.
//
// A kernel is a struct with a static, always inlined `run`. `dispatch<Kernel>(arguments...)` calls
// the best version for this processor. Functions that `run` calls must be RESFAST_INLINE too, so
// that they are compiled for the same instruction set. Results do not depend on the version: the
// build disables contraction to fused multiply-add.
#pragma once

#include <cstdlib>
#include <string_view>

#define RESFAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define RESFAST_AVX2 __attribute__((target("avx2")))
#define RESFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace resfast {

enum class Isa { baseline, avx2, avx512 };

// The instruction set, limited by ATEN_CPU_CAPABILITY (default, avx2, avx512) as in torch.
inline Isa detect_isa() {
#if defined(RESFAST_AVX2)
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = set ? set : "";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && limit != "default";
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 && limit != "avx2" ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::baseline;
}

#if defined(RESFAST_AVX2)
template <class Kernel, class... Arguments>
RESFAST_AVX512 void run_avx512(Arguments&&... arguments) {
  Kernel::run(arguments...);
}

template <class Kernel, class... Arguments>
RESFAST_AVX2 void run_avx2(Arguments&&... arguments) {
  Kernel::run(arguments...);
}
#endif

template <class Kernel, class... Arguments>
void dispatch(Arguments&&... arguments) {
#if defined(RESFAST_AVX2)
  static const Isa isa = detect_isa();
  if (isa == Isa::avx512) return run_avx512<Kernel>(arguments...);
  if (isa == Isa::avx2) return run_avx2<Kernel>(arguments...);
#endif
  Kernel::run(arguments...);
}

} // namespace resfast
