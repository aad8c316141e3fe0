// Run-time choice between the builds of csrc/cpu: every stem is compiled once per instruction set
// into a namespace of its own, so that no inline function of one level can replace another's.
#pragma once

namespace kelix {

enum class Isa { kBaseline, kAvx2, kAvx512 };

#ifdef KELIX_SINGLE_ISA
inline Isa current_isa() { return Isa::kBaseline; }
#define KELIX_FOR_EACH_ISA(declaration) \
  namespace isa_v2 {                    \
  declaration                           \
  }
#define KELIX_CPU(function) (&isa_v2::function)
#else
inline Isa current_isa() {
  static const Isa isa = __builtin_cpu_supports("x86-64-v4")   ? Isa::kAvx512
                         : __builtin_cpu_supports("x86-64-v3") ? Isa::kAvx2
                                                               : Isa::kBaseline;
  return isa;
}
// Declares a function of csrc/cpu for all levels.
#define KELIX_FOR_EACH_ISA(declaration) \
  namespace isa_v2 {                    \
  declaration                           \
  }                                     \
  namespace isa_v3 {                    \
  declaration                           \
  }                                     \
  namespace isa_v4 {                    \
  declaration                           \
  }
// The build of `function` for this machine.
#define KELIX_CPU(function)                          \
  (current_isa() == Isa::kAvx512 ? &isa_v4::function \
   : current_isa() == Isa::kAvx2 ? &isa_v3::function \
                                 : &isa_v2::function)
#endif

}  // namespace kelix
