// proof CASE good|bug SCHEDULE: runs one kernel and prints "right", "wrong" or "error: ...". The
// tests beside it know what each must print.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "gemm.cuh"
#include "hopper_gemm.cuh"
#include "planted.cuh"
#include "simt/schedule.h"

namespace kelix::proof {
namespace {

using Kernel = void (*)(const float*, float*);
using Expected = std::function<float(int)>;

std::vector<float> inputs(int count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i * 37 % 101);
  return values;
}

std::string verdict(bool right) {
  if (const char* error = launch_error()) return std::string("error: ") + error;
  return right ? "right" : "wrong";
}

// One CTA of `threads` threads over `count` floats; out[i] must be expected(i).
std::string run(Kernel good, Kernel bug, bool with_bug, int threads, int count,
                const Expected& expected) {
  const std::vector<float> in = inputs(count);
  std::vector<float> out(in.size(), NAN);
  launch_kernel(with_bug ? bug : good, 1, static_cast<unsigned>(threads), 0, nullptr, in.data(),
                out.data());
  bool right = true;
  for (int i = 0; i < count; ++i) right &= out[static_cast<size_t>(i)] == expected(i);
  return verdict(right);
}

std::string run_grid_barrier(bool with_bug) {
  constexpr unsigned kCtas = 6;
  constexpr unsigned kThreads = 64;
  const std::vector<float> in = inputs(kThreads);
  std::vector<float> out(2 * kCtas * kThreads, NAN);
  unsigned arrived = 0;
  if (with_bug) {
    launch_kernel(grid_barrier_kernel<true>, kCtas, kThreads, 0, nullptr, in.data(), out.data(),
                  &arrived);
  } else {
    launch_kernel_together(grid_barrier_kernel<false>, kCtas, kThreads, 0, nullptr, in.data(),
                           out.data(), &arrived);
  }
  bool right = true;
  for (unsigned i = 0; i < kCtas * kThreads; ++i) {
    right &= out[kCtas * kThreads + i] == in[i % kThreads] + 1;
  }
  return verdict(right);
}

std::string run_grid_rounds(bool with_bug) {
  constexpr unsigned kCtas = 6, kThreads = 64, kRounds = 4;
  const std::vector<float> in = inputs(kThreads);
  std::vector<float> out((kRounds + 1) * kCtas * kThreads, NAN);
  uint32_t arrived = 0;
  launch_kernel_together(with_bug ? grid_rounds_kernel<true> : grid_rounds_kernel<false>, kCtas,
                         kThreads, 0, nullptr, in.data(), out.data(), &arrived);
  bool right = true;
  for (unsigned i = 0; i < kCtas * kThreads; ++i) {
    right &= out[kRounds * kCtas * kThreads + i] == in[i % kThreads] + kRounds;
  }
  return verdict(right);
}

template <GemmBug kBug>
std::string run_gemm() {
  constexpr int kM = 128, kN = 64, kK = 160;
  std::vector<bf16> a(kM * kK);
  std::vector<bf16> b(kN * kK);
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<bf16>(std::sin(0.7f * i));
  for (size_t i = 0; i < b.size(); ++i) b[i] = from_float<bf16>(std::cos(0.3f * i));
  std::vector<float> c(kM * kN, NAN);
  launch_kernel(gemm_kernel<kBug>, dim3(kN / kTile, kM / kTile), kGemmThreads, kGemmShared, nullptr,
                a.data(), b.data(), c.data(), kN, kK);
  bool right = true;
  for (size_t row = 0; row < kM; ++row) {
    for (size_t column = 0; column < kN; ++column) {
      double sum = 0;
      for (size_t i = 0; i < kK; ++i) {
        sum += static_cast<double>(to_float(a[row * kK + i])) * to_float(b[column * kK + i]);
      }
      right &= std::fabs(c[row * kN + column] - sum) < 1e-4;
    }
  }
  return verdict(right);
}

template <HopperBug kBug>
std::string run_hopper_gemm() {
  constexpr int kRows = 50, kColumns = 128, kK = 296;
  std::vector<uint4> memory((kRows + kColumns) * kK * sizeof(bf16) / sizeof(uint4));
  auto* a = reinterpret_cast<bf16*>(memory.data());  // aligned to 16 bytes
  bf16* b = a + kRows * kK;
  for (int i = 0; i < kRows * kK; ++i) a[i] = from_float<bf16>(std::sin(0.7f * i));
  for (int i = 0; i < kColumns * kK; ++i) b[i] = from_float<bf16>(std::cos(0.3f * i));
  TensorMap map_a, map_b;
  if (!make_tensor_map(&map_a, a, kRows, kK, 64) ||
      !make_tensor_map(&map_b, b, kColumns, kK, 128)) {
    return "no tensor map";
  }
  std::vector<float> c(64 * kColumns, NAN);
  launch_kernel(hopper_gemm_kernel<kBug>, 1, kHopperThreads, sizeof(HopperShared), nullptr, map_a,
                map_b, c.data(), (kK + 63) / 64);
  bool right = true;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0;
      for (int i = 0; row < kRows && i < kK; ++i) {
        sum += static_cast<double>(to_float(a[row * kK + i])) * to_float(b[column * kK + i]);
      }
      right &= std::fabs(c[static_cast<size_t>(row * kColumns + column)] - sum) < 1e-4;
    }
  }
  return verdict(right);
}

template <HopperBug kBug>
std::string hopper_case(bool bug) {
  return bug ? run_hopper_gemm<kBug>() : run_hopper_gemm<HopperBug::kNone>();
}

float half_sum(int i) {
  const std::vector<float> in = inputs(64);
  float sum = 0;
  for (int lane = i / 16 * 16; lane < i / 16 * 16 + 16; ++lane)
    sum += in[static_cast<size_t>(lane)];
  return sum;
}

float warp_largest(int i) {
  const std::vector<float> in = inputs(64);
  float largest = 0;
  for (int lane = i / 32 * 32; lane < i / 32 * 32 + 32; ++lane) {
    largest = std::fmax(largest, in[static_cast<size_t>(lane)]);
  }
  return largest;
}

const std::map<std::string, std::function<std::string(bool)>>& cases() {
  static const Expected same = [](int i) { return inputs(256)[static_cast<size_t>(i)]; };
  static const std::map<std::string, std::function<std::string(bool)>> all = {
      {"reverse",
       [](bool bug) {
         return run(reverse_kernel<false>, reverse_kernel<true>, bug, 128, 128,
                    [](int i) { return same(127 - i); });
       }},
      {"rotate",
       [](bool bug) {
         return run(rotate_kernel<false>, rotate_kernel<true>, bug, 128, 128,
                    [](int i) { return same((i + 8) % 128) + 8; });
       }},
      {"copy",
       [](bool bug) { return run(copy_kernel<false>, copy_kernel<true>, bug, 32, 256, same); }},
      {"narrow_copy",
       [](bool bug) {
         return run(narrow_copy_kernel<false>, narrow_copy_kernel<true>, bug, 128, 128,
                    [](int i) { return same(127 - i); });
       }},
      {"half_sums",
       [](bool bug) {
         return run(half_sums_kernel<false>, half_sums_kernel<true>, bug, 64, 64, half_sum);
       }},
      {"split_barrier",
       [](bool bug) {
         return run(split_barrier_kernel<false>, split_barrier_kernel<true>, bug, 128, 128, same);
       }},
      {"deadlock",
       [](bool bug) {
         return run(deadlock_kernel<false>, deadlock_kernel<true>, bug, 64, 64, warp_largest);
       }},
      {"shared_overrun",
       [](bool bug) {
         return run(shared_overrun_kernel<false>, shared_overrun_kernel<true>, bug, 128, 128, same);
       }},
      {"global_overrun",
       [](bool bug) {
         return run(global_overrun_kernel<false>, global_overrun_kernel<true>, bug, 128, 128, same);
       }},
      {"misaligned",
       [](bool bug) {
         return run(misaligned_kernel<false>, misaligned_kernel<true>, bug, 128, 128, same);
       }},
      {"absent_lane",
       [](bool bug) {
         return run(absent_lane_kernel<false>, absent_lane_kernel<true>, bug, 32, 32,
                    [](int i) { return same(i < 16 ? i ^ 8 : i); });
       }},
      {"masked_out",
       [](bool bug) {
         return run(masked_out_kernel<false>, masked_out_kernel<true>, bug, 64, 64, same);
       }},
      {"row_overrun",
       [](bool bug) {
         return run(row_overrun_kernel<false>, row_overrun_kernel<true>, bug, 128, 128, same);
       }},
      {"block_size",
       [](bool bug) {
         return run(reverse_kernel<false>, reverse_kernel<false>, bug, bug ? 2048 : 128, 128,
                    [](int i) { return same(127 - i); });
       }},
      {"grid_barrier", run_grid_barrier},
      {"grid_rounds", run_grid_rounds},
      {"gemm_barrier",
       [](bool bug) { return bug ? run_gemm<GemmBug::kNoBarrier>() : run_gemm<GemmBug::kNone>(); }},
      {"gemm_wait",
       [](bool bug) { return bug ? run_gemm<GemmBug::kNoWait>() : run_gemm<GemmBug::kNone>(); }},
      {"hopper_full_wait", hopper_case<HopperBug::kNoFullWait>},
      {"hopper_empty_wait", hopper_case<HopperBug::kNoEmptyWait>},
      {"hopper_product_wait", hopper_case<HopperBug::kNoProductWait>},
      {"hopper_bytes", hopper_case<HopperBug::kTooManyBytes>},
  };
  return all;
}

}  // namespace
}  // namespace kelix::proof

int main(int argc, char** argv) {
  const auto& cases = kelix::proof::cases();
  if (argc != 4 || cases.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: %s CASE good|bug SCHEDULE(0-7)\n", argv[0]);
    return 2;
  }
  simt::schedule() = simt::schedule_of(std::atoi(argv[3]));
  std::printf("%s\n", cases.at(argv[1])(std::string(argv[2]) == "bug").c_str());
  return 0;
}
