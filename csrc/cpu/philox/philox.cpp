// resfast::philox on the CPU; schema and documentation: resfast/ops/philox/op.py.

#include <cstdint>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "../common/isa.h"

namespace resfast {
namespace {

constexpr uint64_t kMask = 0xFFFFFFFF;

// The words of indices [begin, end); word w of index i is words[w * count + i].
struct Words {
  static RESFAST_INLINE void run(
      const int64_t* __restrict indices, int64_t* __restrict words, int64_t count, int64_t begin,
      int64_t end, uint64_t seed, uint64_t epoch, uint64_t stream) {
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t index = static_cast<uint64_t>(indices[i]);
      uint64_t word0 = index & kMask, word1 = index >> 32, word2 = epoch, word3 = stream;
      uint64_t key0 = seed & kMask, key1 = seed >> 32;
      for (int round = 0; round < 10; ++round) {
        const uint64_t first = word0 * 0xD2511F53, second = word2 * 0xCD9E8D57;
        word0 = (second >> 32) ^ word1 ^ key0;
        word1 = second & kMask;
        word2 = (first >> 32) ^ word3 ^ key1;
        word3 = first & kMask;
        key0 = (key0 + 0x9E3779B9) & kMask;
        key1 = (key1 + 0xBB67AE85) & kMask;
      }
      words[i] = static_cast<int64_t>(word0);
      words[count + i] = static_cast<int64_t>(word1);
      words[2 * count + i] = static_cast<int64_t>(word2);
      words[3 * count + i] = static_cast<int64_t>(word3);
    }
  }
};

Tensor philox(const Tensor& indices, int64_t seed, int64_t epoch, int64_t stream) {
  if (indices.scalar_type() != ScalarType::Long)
    fail("indices are ", dtype_name(indices.scalar_type()), "; expected torch.int64");
  if (indices.dim() != 1) fail("indices are ", shape_name(indices.sizes()), "; expected [B]");
  if (!indices.is_contiguous()) fail("indices are not contiguous");
  for (auto [name, word] : {std::pair{"epoch", epoch}, std::pair{"stream", stream}})
    if (word < 0 || word > static_cast<int64_t>(kMask))
      fail(name, " ", word, " is out of range; expected 0 to 2^32 - 1");

  const int64_t count = indices.size(0);
  Tensor result = torch::stable::empty({4, count}, ScalarType::Long);
  const int64_t* source = indices.const_data_ptr<int64_t>();
  int64_t* words = result.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    dispatch<Words>(
        source, words, count, begin, end, static_cast<uint64_t>(seed),
        static_cast<uint64_t>(epoch), static_cast<uint64_t>(stream));
  });
  return result;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("philox", TORCH_BOX(&resfast::philox));
}
