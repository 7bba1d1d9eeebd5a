// Transformer blocks that follow one another, as one operation, for one token of each sequence, float32.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "block.h"
#include "mlx/array.h"
#include "ops.h"

namespace spqt {

// Of each block what HeadStep, TokenStep and TailStep give, bit for bit. MLX's graph has one node where it had three
// for each block, and what does not depend on the token is planned once.
class ChainStep {
 public:
  using Block = std::tuple<HeadStep, TokenStep, TailStep>;

  // The blocks' arrays must be available, and in order.
  explicit ChainStep(std::vector<Block> blocks);

  using Array = mlx::core::array;
  using Arrays = std::vector<Array>;
  // Of several sequences: of each block padding (sequences,) int32, and mask (sequences, ..., place + 1) bool, as
  // TokenStep's.
  using Batch = std::optional<std::pair<Arrays, Array>>;

  // Whether x and the caches are such as follows.
  bool takes(const Array& x, const Arrays& keys, const Arrays& values, const std::vector<int>& places, const Batch& batch) const;

  // x (..., width), one row of each sequence; of each block keys and values as TokenStep's, and how much of them is
  // taken. counted: uint32, the active channels so far of q, k, v, out, gate, up and down of the first block, then of
  // the next, (7 * blocks,), of several rows (7 * blocks, rows + 1), as SparseStep's; or none. Returns y, keys and
  // values of each block, and the counts.
  std::tuple<Arrays, Arrays, Arrays, Array> operator()(
      const Array& x,
      const Arrays& keys,
      const Arrays& values,
      const std::vector<int>& places,
      const std::optional<Array>& counted,
      const Batch& batch) const;

  struct Blocks;

 private:
  std::shared_ptr<Blocks> blocks_;
};

}  // namespace spqt
