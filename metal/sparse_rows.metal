// y = x @ W.T for a few rows of x, each over its own active channels; the codes of a channel are unpacked once
// for TOKENS rows. Used for prompts of a few tokens, and for batches: a channel is read if any row needs it, and
// a row that does not need it multiplies by zero.
//
// Arrays (P projections of one input)
//   x         (rows, inputs) T
//   settings  settings.h
//   packed    as in sparse_gemv.metal
//   rows      [0]: how many rows x has
//   y         with one stripe (rows, outputs) T of the projection
//   active    with one stripe (P, rows) uint32: active channels
//   partials  else (stripes, rows, positions) float32: of a row its sums, tile by tile, outputs in their order;
//             then COUNTS uint32: its active channels, entry i for projection i % P
// Constants (kernel_text.py writes them in front)
//   T, S, BITS, GROUP, P, SLICE, DECODE, PER_CHANNEL, HAS_BIAS  as in sparse_gemv.metal
//   TOKENS   rows of x in one threadgroup: 2, 4 or 8
//   VALUES   float2 for two of them, else float4
//   OUTPUTS  outputs of one lane: 8, 16 or 32; a lane holds OUTPUTS * TOKENS sums
//   LANES    lanes side by side on one channel, a power of two; a tile is LANES * OUTPUTS outputs
//   ROWS     channels in work at one time, a power of two up to LISTS; THREADS = LANES * ROWS, whole simdgroups
//   UNROLL   channels a lane loads before it multiplies
//   LIST     channels collected at one time: a multiple of 32 * LISTS
// Grid: (tiles of all projections * tiles of TOKENS rows, stripes) threadgroups of THREADS. Those that share
// weights lie side by side, so that a cache holds them.
//
// A pass of LIST channels is cut into LISTS spans, whose active channels are listed apart. Channel-row r of lanes
// walks lists r, r + ROWS, ...: which lane adds a channel up, and when, does not depend on what the others of the
// batch skip, so a row's sums are the same bits beside any others.

enum : int {
  LISTS = 8,
  SPAN = LIST / LISTS,
  SIMDGROUPS = THREADS / 32,
  WIDE = TOKENS > 2 ? 4 : 2,  // rows in one VALUES
  PIECES = TOKENS / WIDE,
  NARROW = LANES < 32,
  SUMMANDS = NARROW ? SIMDGROUPS : ROWS,
  STEP = SLICE < OUTPUTS ? SLICE : OUTPUTS,
  COLUMNS = LANES + 4  // so that reading across does not meet one bank of the memory
};

struct RowsMemory {
  ushort channel_list[LIST];               // counted from the first of the pass
  VALUES value_list[(LIST + 1) * PIECES];  // x of a listed channel in every row; behind them a channel of zeros
  uint list_count[LISTS];
  uint simdgroup_count[TOKENS * SIMDGROUPS];
  float partial[SUMMANDS * STEP * COLUMNS];
};

METAL_FUNC float2 gathered(float2 made, float a, float b, float, float) {
  made.x = a;
  made.y = b;
  return made;
}
METAL_FUNC float4 gathered(float4 made, float a, float b, float c, float d) {
  made.x = a;
  made.y = b;
  made.z = c;
  made.w = d;
  return made;
}
METAL_FUNC float entry_of(float2 values, int i) { return i == 0 ? values.x : values.y; }
METAL_FUNC float entry_of(float4 values, int i) {
  return i < 2 ? (i == 0 ? values.x : values.y) : (i == 2 ? values.z : values.w);
}

// One threadgroup's tile, rows and stripe. y, counts: with PARTIAL of the tile's sums and of a row's counts, whose
// next rows follow `positions` later; else of the projection and of its first row.
template <bool PARTIAL, typename Y>
METAL_FUNC void multiply_rows(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                              uint rows, device Y* y, device uint32_t* counts, uint first_token, uint tile,
                              uint projection, threadgroup RowsMemory& memory, const Thread me) {
  const device LaunchSettings& launch = launch_of(settings);
  const device ProjectionSettings& own = *projection_settings(settings, projection);
  const uint lane = me.index;
  const uint inputs = launch.inputs;
  const uint positions = launch.positions;
  const uint stripe_first = min(me.threadgroup_y * launch.stripe, inputs);
  const uint stripe_last = min(stripe_first + launch.stripe, inputs);
  const uint tokens = min(rows - first_token, uint(TOKENS));
  const device T* mine = x + ulong(first_token) * inputs;

  const uint band = own.band;
  const uint tile_here = tile - own.first_tile;
  const uint band_index = tile_here / own.tiles;
  const uint tile_first = (tile_here - band_index * own.tiles) * (LANES * OUTPUTS);  // in the band

  const uint row = lane / LANES;
  const uint unit = lane % LANES;  // which outputs of the tile
  const uint output = tile_first + unit * OUTPUTS;
  const uint words = band / 32 * BITS;  // of one chunk
  const uint groups = band / GROUP;
  const ulong chunks_before = ulong(band_index) * inputs;  // of the bands before
  const device uint32_t* codes = packed + own.weight + chunks_before * words;
  const device S* scale = (const device S*)(packed + own.scales) + chunks_before * groups + output / GROUP;
  const device S* offset = (const device S*)(packed + own.biases) + chunks_before * groups + output / GROUP;
  const device float* thresholds = thresholds_of(settings, P);
  const uint threshold_count = PER_CHANNEL ? P * inputs : P;
  const device float* bias = thresholds + threshold_count + biases_before(settings, projection);

  // As in sparse_gemv.metal: codes are used where they lie in the word.
  constexpr uint MASK = (1u << BITS) - 1u;
  constexpr int ROOM = DECODE == 1 ? 32 : 23;
  constexpr float TWO_TO_23 = 8388608.0f;
  constexpr uint TWO_TO_23_BITS = 0x4B000000u;
  constexpr float LIFT = 18446744073709551616.0f;                 // 2^64
  constexpr float SUBNORMAL_ONE = 38685626227668133590597632.0f;  // 2^85
  constexpr uint MIDDLE = DECODE == 0 ? 1u << (BITS - 1) : 0;
  constexpr bool TOP_UNMASKED = DECODE == 1 && 32 % BITS == 0;

  float sums[TOKENS][OUTPUTS] = {};
  float constant_part[TOKENS] = {};  // of the biases: the same for all outputs of a group

  if (lane < uint(PIECES)) {
    memory.value_list[LIST * PIECES + lane] = gathered(VALUES(), 0.0f, 0.0f, 0.0f, 0.0f);
  }
  for (uint pass = stripe_first; pass < stripe_last; pass += LIST) {
    // Collect: a simdgroup lists whole spans, 32 neighbouring channels at a time.
    for (uint list = me.simdgroup; list < uint(LISTS); list += SIMDGROUPS) {
      uint found = 0;
      for (uint tested = list * SPAN; tested < (list + 1) * SPAN; tested += 32) {
        const uint in_pass = tested + me.in_simdgroup;
        const uint k = pass + in_pass;
        float value[TOKENS];
        uint needed = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          value[t] = 0.0f;
          if (k < stripe_last && uint(t) < tokens) {
            const float given = float(mine[ulong(t) * inputs + k]);
            const uint at = PER_CHANNEL ? projection * inputs + k : projection;
            if (!(fabs(given) < thresholds[at])) {
              value[t] = given;
              needed = 1;
            }
          }
        }
        const uint before = simd_prefix_exclusive_sum(needed);
        if (needed > 0) {
          const uint at = list * SPAN + found + before;
          memory.channel_list[at] = ushort(in_pass);
#pragma unroll
          for (int p = 0; p < PIECES; ++p) {
            memory.value_list[at * PIECES + p] =
                gathered(VALUES(), value[p * WIDE], value[p * WIDE + 1], value[p * WIDE + 2 % WIDE],
                         value[p * WIDE + 3 % WIDE]);
          }
        }
        found += simd_broadcast(before + needed, ushort(31));
      }
      if (me.in_simdgroup == 0) {
        memory.list_count[list] = found;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Multiply. All loads of UNROLL channels first, so that they are in flight together.
    for (uint list = output < band ? row : uint(LISTS); list < uint(LISTS); list += ROWS) {
      const uint count = memory.list_count[list];
      for (uint first = 0; first < count; first += UNROLL) {
        LaneCodes word[UNROLL];
        float scaled[UNROLL], least[UNROLL];
        uint entry[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          // Past the end: the last channel again, times zero. It is in the cache, and no branch is needed.
          const uint here = list * SPAN + first + u;
          entry[u] = first + u < count ? here : uint(LIST);
          const uint k = pass + memory.channel_list[list * SPAN + min(first + u, count - 1)];
          word[u] = lane_codes(strides_behind(codes, k, words * 4), output, words);
          scaled[u] = float(*strides_behind(scale, k, groups * sizeof(S)));
          least[u] = float(*strides_behind(offset, k, groups * sizeof(S)));
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const float constant_weight = MIDDLE > 0 ? fma(float(MIDDLE), scaled[u], least[u]) : least[u];
          const float scaled_code = scaled[u] * (DECODE == 2 ? LIFT : 1.0f);
          float step[TOKENS];
#pragma unroll
          for (int p = 0; p < PIECES; ++p) {
            const VALUES values = memory.value_list[entry[u] * PIECES + p];
#pragma unroll
            for (int i = 0; i < WIDE; ++i) {
              const float value = entry_of(values, i);
              const int t = p * WIDE + i;
              step[t] = scaled_code * value;
              constant_part[t] = fma(constant_weight, value, constant_part[t]);
            }
          }
#pragma unroll
          for (int c = 0; c < OUTPUTS; ++c) {
            const int start = c * BITS % 32;
            const bool early = start + BITS <= ROOM;
            const int shift = early ? start : start - 16;
            const uint here = word[u].word[c * BITS / 32];
            const uint next = word[u].word[c * BITS / 32 + 1];
            const uint view = early ? here : (here >> 16 | next << 16);
            float code;
            if (DECODE == 0) {
              const uint bits = (view | TWO_TO_23_BITS) & (TWO_TO_23_BITS | MASK << shift);
              code = as_type<float>(bits) - (TWO_TO_23 + float(MIDDLE << shift));
            } else if (DECODE == 1) {
              code = float(TOP_UNMASKED && start + BITS == 32 ? here : view & MASK << shift);
            } else {
              code = as_type<float>(view & MASK << shift);
            }
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
              sums[t][c] = fma(code, step[t], sums[t][c]);
            }
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next pass writes the lists
  }

#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    // The top code of a word was taken with all codes below it: their sums, on the same scale, go out again.
#pragma unroll
    for (int c = 0; c < OUTPUTS; ++c) {
      const int codes_below = (c * BITS % 32) / BITS;
      if (TOP_UNMASKED && (c + 1) * BITS % 32 == 0) {
        float below = 0.0f;
#pragma unroll
        for (int other = c - codes_below; other < c; ++other) {
          below += sums[t][other];
        }
        sums[t][c] -= below;
      }
    }
    // Undo the shifts; add what is the same for the whole group; sum over the channel-rows of a simdgroup.
#pragma unroll
    for (int c = 0; c < OUTPUTS; ++c) {
      const int start = c * BITS % 32;
      const int shift = start + BITS <= ROOM ? start : start - 16;
      const float unit_of_code = 1.0f / float(1u << shift) * (DECODE == 2 ? SUBNORMAL_ONE : 1.0f);
      sums[t][c] = fma(sums[t][c], unit_of_code, constant_part[t]);
#pragma unroll
      for (int distance = LANES; distance < 32; distance *= 2) {
        sums[t][c] += simd_shuffle_xor(sums[t][c], ushort(distance));
      }
    }
  }

  // Sum over the others through threadgroup memory, in slices that fit.
  const uint summand = NARROW ? me.simdgroup : row;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (uint(t) < tokens) {  // the same for the whole threadgroup
#pragma unroll
      for (int slice = 0; slice < OUTPUTS; slice += STEP) {
        if (!NARROW || me.in_simdgroup < uint(LANES)) {
#pragma unroll
          for (int c = 0; c < STEP; ++c) {
            memory.partial[(summand * STEP + c) * COLUMNS + unit] = sums[t][slice + c];
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint j = lane; j < uint(STEP * LANES); j += THREADS) {
          float sum = 0.0f;
          for (uint r = 0; r < uint(SUMMANDS); ++r) {
            sum += memory.partial[(r * STEP + j % STEP) * COLUMNS + j / STEP];
          }
          const uint in_tile = j / STEP * OUTPUTS + slice + j % STEP;
          if (PARTIAL) {
            y[ulong(t) * positions + in_tile] = Y(sum);
          } else {
            const uint at = band_index * band + tile_first + in_tile;
            if (tile_first + in_tile < band && at < own.outputs) {
              y[ulong(first_token + t) * own.outputs + at] = Y(HAS_BIAS ? sum + bias[at] : sum);
            }
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next slice is written
      }
    }
  }

  if (tile_here == 0) {  // the same for the whole threadgroup
    for (uint t = 0; t < tokens; ++t) {
      uint met = 0;
      for (uint k = stripe_first + lane; k < stripe_last; k += THREADS) {
        const uint at = PER_CHANNEL ? projection * inputs + k : projection;
        met += fabs(float(mine[ulong(t) * inputs + k])) < thresholds[at] ? 0 : 1;
      }
      const uint before = simd_prefix_exclusive_sum(met);
      if (me.in_simdgroup == 31) {
        memory.simdgroup_count[t * SIMDGROUPS + me.simdgroup] = before + met;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint entries = PARTIAL ? COUNTS : 1;
    for (uint j = lane; j < tokens * entries; j += THREADS) {
      const uint t = j / entries;
      if (!PARTIAL || j % entries % P == projection) {
        uint met = 0;
        for (uint g = 0; g < uint(SIMDGROUPS); ++g) {
          met += memory.simdgroup_count[t * SIMDGROUPS + g];
        }
        counts[PARTIAL ? t * positions + j % entries : first_token + t] = met;
      }
    }
  }
}

// K in one stripe.
METAL_FUNC void sparse_rows(const device T* x, const device uint32_t* settings, const device uint32_t* packed,
                            uint rows, device T* y, device uint32_t* active, uint tile, uint first_token,
                            uint projection, threadgroup RowsMemory& memory, const Thread me) {
  device uint32_t* counts = active + projection * rows;
  multiply_rows<false>(x, settings, packed, rows, y, counts, first_token, tile, projection, memory, me);
}

// K in several stripes.
METAL_FUNC void sparse_rows_stripe(const device T* x, const device uint32_t* settings,
                                   const device uint32_t* packed, uint rows, device float* partials, uint tile,
                                   uint first_token, uint projection, threadgroup RowsMemory& memory,
                                   const Thread me) {
  const uint positions = launch_of(settings).positions;
  device float* sums = partials + (ulong(me.threadgroup_y) * rows + first_token) * positions;
  device uint32_t* counts = (device uint32_t*)(sums + positions - COUNTS);
  device float* at = sums + tile * (LANES * OUTPUTS);
  multiply_rows<true>(x, settings, packed, rows, at, counts, first_token, tile, projection, memory, me);
}
