// Transformer blocks that follow one another, as one operation, for one token of one sequence, float32.
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

  // Evaluates the blocks' arrays.
  explicit ChainStep(std::vector<Block> blocks);

  // Whether x and the caches are such as follows.
  bool takes(
      const mlx::core::array& x,
      const std::vector<mlx::core::array>& keys,
      const std::vector<mlx::core::array>& values,
      const std::vector<int>& places) const;

  // x (..., width), one row; of each block keys and values as TokenStep's, and how much of them is taken. counted:
  // uint32, the active channels so far of q, k, v, out, gate, up and down of the first block, then of the next; or
  // none. Returns y, keys and values of each block, and the counts.
  std::tuple<std::vector<mlx::core::array>, std::vector<mlx::core::array>, std::vector<mlx::core::array>, mlx::core::array>
  operator()(
      const mlx::core::array& x,
      const std::vector<mlx::core::array>& keys,
      const std::vector<mlx::core::array>& values,
      const std::vector<int>& places,
      const std::optional<mlx::core::array>& counted) const;

  struct Blocks;

 private:
  std::shared_ptr<Blocks> blocks_;
};

}  // namespace spqt
