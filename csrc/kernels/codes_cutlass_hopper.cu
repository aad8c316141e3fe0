// Nearest codes as a CUTLASS product of sm_90a over all books, with an epilogue of its own that
// looks for the nearest code in the accumulators. Its hand-written sibling is codes_hopper.cuh.
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "kernels/codes_cutlass.h"
#include "kernels/codes_tile.cuh"

namespace kelix::cuda {
namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_64;

// The collective that CUTLASS calls with the products of a tile. Nothing of them is stored: a
// token's nearest code of the tile goes as a key into the memory of the indices.
template <class T, bool kReference>
class NearestEpilogue {
 public:
  using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
  using DispatchPolicy = EpilogueSchedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementOutput = float;
  using ElementC = float;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, _1, int64_t>;
  using StrideD = StrideC;
  struct ThreadEpilogueOp {
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
  };
  struct SharedStorage {};
  using TensorStorage = SharedStorage;

  struct Arguments {
    const float* norms;        // [books, codes]
    const float* token_norms;  // [tokens, books], reference only
    uint64_t* keys;            // [tokens, books]
  };
  using Params = Arguments;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit NearestEpilogue(const Params& params) : params_(params) {}

  // A thread's accumulators are (2 columns, 2 rows, groups of 8 columns) x rows x columns.
  template <class Shape, class Tile, class Coord, class Engine, class Layout, class Mma,
            class Residue>
  CUTLASS_DEVICE void operator()(Shape shape, Tile tile, Coord coord,
                                 const cute::Tensor<Engine, Layout>& dots, Mma mma, Residue,
                                 int thread, char*) const {
    const int tokens = cute::get<0>(shape);
    const int codes = cute::get<1>(shape);
    const int books = cute::get<3>(shape);
    const int book = cute::get<3>(coord);
    const auto places = mma.get_thread_slice(thread).partition_C(
        cute::make_identity_tensor(cute::take<0, 2>(tile)));
    const int first_token = cute::get<0>(coord) * cute::size<0>(tile);
    const int first_code = cute::get<1>(coord) * cute::size<1>(tile);
    constexpr int kRows = 2 * decltype(cute::size<1>(dots))::value;
    constexpr int kColumns = decltype(cute::size<0>(dots))::value / 2;
    static_assert(decltype(cute::size<2>(dots))::value == 1 && kColumns % 8 == 0);
    const auto at = [](int row, int column) {
      return cute::make_coord(cute::make_coord(column % 2, row % 2, column / 2), row / 2, 0);
    };

    NearestCode<T, kReference> nearest[kRows];
    float token_norm[kRows] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; kReference && row < kRows; ++row) {
      const int token = first_token + cute::get<0>(places(at(row, 0)));
      if (token < tokens) {
        token_norm[row] = params_.token_norms[static_cast<int64_t>(token) * books + book];
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kColumns; first += 8) {
      float norms[8];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int code = first_code + cute::get<1>(places(at(0, first + j)));
        norms[j] =
            code < codes ? params_.norms[static_cast<int64_t>(book) * codes + code] : INFINITY;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        float scores[8];
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 8; ++j) {
          const float sum = kReference ? token_norm[row] + norms[j] : norms[j];
          scores[j] = sum - 2.0f * dots(at(row, first + j));
        }
        nearest[row].offer(scores, [&](int j) {
          return first_code + static_cast<int>(cute::get<1>(places(at(0, first + j))));
        });
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const uint64_t key = smallest_of_four_lanes(nearest[row].key());
      const int token = first_token + cute::get<0>(places(at(row, 0)));
      if (thread % 4 == 0 && token < tokens) {
        atomic_min(params_.keys + static_cast<int64_t>(token) * books + book, key);
      }
    }
  }

 private:
  Params params_;
};

template <class T>
struct CutlassType;
template <>
struct CutlassType<bf16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct CutlassType<f16> {
  using Type = cutlass::half_t;
};

// 128 tokens x 128 codes; two CTAs of a cluster share the codes. One warpgroup looks at its scores
// while the other multiplies.
template <class T, bool kReference>
struct Product {
  using Element = typename CutlassType<T>::Type;
  using Rows = cutlass::layout::RowMajor;
  using Columns = cutlass::layout::ColumnMajor;
  using Tile = cute::Shape<_128, _128, _64>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Rows, kChunk, Element, Columns,
      kChunk, float, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<0>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      NearestEpilogue<T, kReference>>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

template <class T, bool kReference>
const char* launch(const NearestCodesArgs& args, void* stream) {
  using Kernel = typename Product<T, kReference>::Kernel;
  using Element = typename Product<T, kReference>::Element;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  const auto extent = [](int64_t size) { return static_cast<int>(size); };
  typename Gemm::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kBatched;
  arguments.problem_shape = {extent(args.tokens), extent(args.codes), extent(args.dim),
                             extent(args.books)};
  arguments.mainloop.ptr_A = static_cast<const Element*>(args.z);
  arguments.mainloop.dA = {args.books * args.dim, _1{}, args.dim};
  arguments.mainloop.ptr_B = static_cast<const Element*>(args.codebooks);
  arguments.mainloop.dB = {args.dim, _1{}, args.codes * args.dim};
  arguments.epilogue = {args.norms, args.token_norms, reinterpret_cast<uint64_t*>(args.indices)};
  arguments.hw_info.sm_count = num_multiprocessors();
  Gemm gemm;
  const cutlass::Status ready = gemm.can_implement(arguments);
  if (ready != cutlass::Status::kSuccess) return cutlass::cutlassGetStatusString(ready);
  const cutlass::Status done = gemm.run(arguments, nullptr, static_cast<cudaStream_t>(stream));
  return done == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(done);
}

}  // namespace

const char* launch_codes_cutlass(const NearestCodesArgs& args, void* stream) {
  if (args.dtype == DType::kBFloat16) {
    return args.reference ? launch<bf16, true>(args, stream) : launch<bf16, false>(args, stream);
  }
  return args.reference ? launch<f16, true>(args, stream) : launch<f16, false>(args, stream);
}

}  // namespace kelix::cuda
