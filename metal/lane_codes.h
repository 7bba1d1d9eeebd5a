// The codes of one lane: OUTPUTS neighbours of a chunk, as words that begin with the first of them, wherever
// in a word that lies. Wants OUTPUTS, at most 32, and BITS.

enum : int {
  LANE_BITS = OUTPUTS * BITS,
  // Bits, a power of two: every lane's codes begin at a multiple of it.
  GRAIN = (LANE_BITS & -LANE_BITS) < 32 ? (LANE_BITS & -LANE_BITS) : 32,
  CODE_WORDS = (LANE_BITS + 31) / 32,
  LOADED = (LANE_BITS + 32 - GRAIN + 31) / 32  // words that a lane's codes can touch
};

struct LaneCodes {
  uint word[CODE_WORDS + 1];  // bits behind the codes are the next lane's; the last word is 0
};

// What lies `times` strides behind an element: one multiply-add of 64 bits, which indexing is not everywhere.
template <typename Element>
METAL_FUNC const device Element* strides_behind(const device Element* element, uint times, uint stride_bytes) {
  return (const device Element*)((const device unsigned char*)element + ulong(times) * stride_bytes);
}

// first: the first of the codes in the chunk; words: of the chunk.
METAL_FUNC LaneCodes lane_codes(const device uint32_t* chunk, uint first, uint words) {
  LaneCodes codes;
  const uint begin = first * BITS;
  const device uint32_t* from = chunk + begin / 32;
  if (LANE_BITS % 128 == 0 && BITS % 4 == 0) {
#pragma unroll
    for (int j = 0; j < CODE_WORDS / 4; ++j) {
      const uint4 four = ((const device uint4*)from)[j];
      codes.word[4 * j] = four.x;
      codes.word[4 * j + 1] = four.y;
      codes.word[4 * j + 2] = four.z;
      codes.word[4 * j + 3] = four.w;
    }
  } else if (LANE_BITS % 64 == 0 && BITS % 2 == 0) {
#pragma unroll
    for (int j = 0; j < CODE_WORDS / 2; ++j) {
      const uint2 two = ((const device uint2*)from)[j];
      codes.word[2 * j] = two.x;
      codes.word[2 * j + 1] = two.y;
    }
  } else if (LANE_BITS % 32 == 0) {
#pragma unroll
    for (int j = 0; j < CODE_WORDS; ++j) {
      codes.word[j] = from[j];
    }
  } else {
    const uint last = words - 1 - begin / 32;
    const uint shift = begin % 32;
    uint loaded[LOADED + 1];
#pragma unroll
    for (int j = 0; j < LOADED; ++j) {
      loaded[j] = from[min(uint(j), last)];
    }
    loaded[LOADED] = 0;
#pragma unroll
    for (int j = 0; j < CODE_WORDS; ++j) {
      codes.word[j] = loaded[j] >> shift | loaded[j + 1] << 1 << (31 - shift);
    }
  }
  codes.word[CODE_WORDS] = 0;
  return codes;
}

// 16 bits or more of a lane's codes, from bit `start` on.
METAL_FUNC uint bits_from(const LaneCodes codes, int start) {
  const uint here = codes.word[start / 32] >> start % 32;
  return start % 32 <= 16 ? here : here | codes.word[start / 32 + 1] << (start % 32 <= 16 ? 0 : 32 - start % 32);
}

// Two numbers of 16 bits in one word, the first low; of no use, and never used, for wider ones.
METAL_FUNC uint halves(float, float) { return 0; }
METAL_FUNC uint halves(float16_t low, float16_t high) {
  return as_type<ushort>(low) | uint(as_type<ushort>(high)) << 16;
}
METAL_FUNC uint halves(bfloat16_t low, bfloat16_t high) {
  return as_type<ushort>(low) | uint(as_type<ushort>(high)) << 16;
}
