// The ops that dominate decoding once matrices are fast, as primitives. Each has the meaning of MLX's own
// and covers the common case only; `spqt_cli/decode/hooks_cpu.py` asks which that is.
#pragma once

#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "scratch.h"

namespace spqt {

// x (..., width) float32, weight (width,) float32 or none
mlx::core::array rms_norm(const mlx::core::array& x, const std::optional<mlx::core::array>& weight, float eps);

// silu(gate) * up, of one shape, float32
mlx::core::array swiglu(const mlx::core::array& gate, const mlx::core::array& up);

// log(sum(exp(x))) over the last axis or over all, float32
mlx::core::array log_sum_exp(const mlx::core::array& x, bool last, bool keepdims);

// x (batch, heads, positions, width) float32; offset: of all, or (batch,) int32; freqs (dims / 2,) float32,
// evaluated, or none
mlx::core::array rope(
    const mlx::core::array& x,
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    const std::variant<int, mlx::core::array>& offset,
    const std::optional<mlx::core::array>& freqs);

// Rotary positions of one model, as mx.fast.rope's settings. freqs: (dims / 2,) or empty where there is a base.
struct RopeForm {
  int dims;
  bool traditional;
  float base, scale;
  std::vector<float> freqs;
  bool operator==(const RopeForm&) const = default;
};
// Base and freqs as mx.fast.rope takes them: one of the two.
RopeForm rope_form(
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    const std::optional<mlx::core::array>& freqs);
// (positions, dims): of each position dims / 2 cosines, then as many sines
mlx::core::array rope_table(const RopeForm& form, int offset, int positions);
// The same for several sequences, from the offset of each on: (sequences, positions, dims), the calling thread's
// until its next call.
const float* rope_turns(const RopeForm& form, const int32_t* offsets, int sequences, int positions);

// q (batch, heads, rows, width), k and v (batch, key heads, keys, width), float32. Causal, or everything visible, or
// for one row a head a mask: bool (..., keys), of each sequence or one for all; a row that sees nothing gets zeros.
// One row takes the keys in their order from `oldest` on, round to the one before it.
mlx::core::array attention(
    const mlx::core::array& q,
    const mlx::core::array& k,
    const mlx::core::array& v,
    float scale,
    bool causal,
    const std::optional<mlx::core::array>& mask,
    int oldest);

// Where one token of each sequence lies, and its sequences' caches, while a TokenStep runs.
struct TokenPlace {
  const float *q, *k, *v;  // (sequences, heads or key heads, width)
  float* turned;           // room as of q
  float *keys, *values;    // (sequences, key heads, room, width)
  float* y;                // as q
  int room, width, place, sequences;  // place: in the cache
  const float* table = nullptr;       // as rope_table's; nullptr with the next two
  const int32_t* padding = nullptr;   // of each sequence, before its first token
  const bool* mask = nullptr;         // (sequences, place + 1)
  Scratch memory;
};

// Attention of one token of each sequence to a cache that it joins, with rotary positions.
class TokenStep {
 public:
  TokenStep(int heads, int key_heads, float scale, RopeForm form);

  // q (..., heads * width), k and v (..., key heads * width), one row of each sequence; keys and values (sequences,
  // key heads, room, width), of which `place` (below room) are taken; float32. padding (sequences,) int32 and
  // mask (sequences, ..., place + 1) bool, or of one sequence neither: it began at 0 and sees all. The token's
  // position is place - padding. Returns what
  // attention gives, as q, and the cache with k and v in their place: the same memory, where nobody else holds it.
  std::tuple<mlx::core::array, mlx::core::array, mlx::core::array> operator()(
      const mlx::core::array& q,
      const mlx::core::array& k,
      const mlx::core::array& v,
      const mlx::core::array& keys,
      const mlx::core::array& values,
      int place,
      const std::optional<mlx::core::array>& padding,
      const std::optional<mlx::core::array>& mask) const;

  // Whether this is such a cache of so many sequences, of heads of this width, with room at `place`.
  bool takes(const mlx::core::array& keys, const mlx::core::array& values, int place, int sequences, int width) const;
  int heads() const { return heads_; }
  int key_heads() const { return key_heads_; }
  mlx::core::array table(int place) const;
  size_t floats(int width, int place) const;  // of memory for one sequence
  void run(TokenPlace place) const;           // in a task of a stream

 private:
  int heads_, key_heads_;
  float scale_;
  RopeForm form_;
};

}  // namespace spqt
