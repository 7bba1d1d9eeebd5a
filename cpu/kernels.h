// What the kernels compute, as plain structs: one table of functions per instruction set.
//
// It knows nothing of MLX and nothing of threads: a kernel does one task of a larger job.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum Type : int { FLOAT32, FLOAT16, BFLOAT16 };

constexpr int BLOCK = 8;     // active channels multiplied together; the next block is prefetched meanwhile
constexpr int TILE = 8192;   // outputs of one task at most: a whole band as `spqt convert` cuts it
constexpr int PADDING = 16;  // floats: the widest vector

// `groups` groups of one band of a Zigzag matrix, all input channels.
struct Tile {
  const uint8_t* codes;    // chunk of channel 0
  size_t code_stride;      // bytes from one channel to the next
  const void* scales;      // groups of channel 0; w = code * scale + bias
  const void* biases;
  size_t scale_stride;     // elements from one channel to the next
  Type type;               // of scales and biases
  int groups, group_size, bits;
};

struct Active {
  const int32_t* channel;  // (count,), rising: what any of the rows needs
  const float* x;          // (count, rows), 0 where a row skips the channel
  int count;
  int rows = 1;            // of x: 1, 2, 4 or 8
  size_t row_stride = 0;   // floats from one row's partial result to the next's
};
constexpr int FEW_ROWS = 8;
// Outputs of one task: sums of all rows stay in L2, and runs of a chunk are long.
constexpr int tile_of_rows(int rows) { return rows <= 4 ? TILE : TILE / 2; }

// x as it lies in memory, and what decides which channels are skipped.
struct Input {
  const void* x;
  Type type;
  int64_t stride;          // elements
  int inputs;
  const float* threshold;  // nullptr: every channel is active
  int64_t threshold_stride;  // 0 where one threshold serves all channels
};

// Where the sums of a tile go.
struct Output {
  void* y;
  Type type;
  int outputs;       // of this tile, without the band's padding
  const void* bias;  // the layer's bias or nullptr
  Type bias_type;
};

// Floats of one partial result: sums in the order of unpacking, then sums of x * bias by group.
constexpr size_t partial_sums(int groups, int group_size) {
  return ((size_t)groups * group_size + 255) / 256 * 256;  // 256: the widest column of outputs
}
constexpr size_t partial_size(int groups, int group_size) {
  return partial_sums(groups, group_size) + ((size_t)groups + PADDING - 1) / PADDING * PADDING;
}

constexpr int GEMM_OUTPUTS = 64;    // of one panel of weights made float
constexpr int GEMM_INPUTS = 256;    // of one panel: 64 KB, in L2
constexpr int GEMM_ROWS = 256;      // of one task, enough to make unpacking cheap

// A block of y = x @ W.T: `rows` rows of x by `outputs` (at most GEMM_OUTPUTS) outputs.
struct Gemm {
  const float* x;      // the first row; rows lie x_stride floats apart
  int64_t x_stride;
  int rows, inputs;
  Tile weights;        // of the whole band (or matrix); `groups` is not read
  int first;           // first output of the block within `weights`, a multiple of 32
  bool along_inputs;   // groups lie along the inputs, as MLX stores its own matrices
  Output out;          // of the first row
  int64_t y_stride;    // elements
};

// Some rows of a matrix in MLX's own layout, times some prepared rows of x.
struct Rows {
  Tile weights;             // of row 0; strides are from row to row; `groups` is not read
  int inputs, first, count;
  const float* prepared;    // as `prepare` left it
  const float* group_sums;  // (inputs / group_size,)
  Output out;               // of row 0
  int tokens = 1;           // rows of x: 1, 2 or 4
  size_t stride = 0;        // floats from one's `prepared`, and group_sums, to the next's
  int64_t y_stride = 0;     // elements
};

// Floats that `prepare` may fill.
constexpr size_t prepared_size(int inputs) { return ((size_t)inputs + 255) / 256 * 256; }

// Some rows of RMS normalization: y = x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
  const float* x;
  const float* weight;  // (width,) or nullptr
  float* y;
  int rows, width;
  float eps;
};

// Rotary positions of one sequence of one head.
struct Rope {
  const float* x;
  float* y;
  int64_t x_stride, y_stride;  // from position to position
  const float* table;          // per position: `half` cosines, then `half` sines
  int positions, half, width;  // values past 2 * half pass through
  bool traditional;            // pairs are neighbours, else half a head apart
};

// Attention of some query rows of one head (or of several that share their keys) to `keys` positions.
struct Attend {
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // from row to row
  int rows, keys, width;                 // width: a multiple of 16, at most ATTEND_WIDTH
  float scale;
  int visible;      // keys that the first row sees; each row after it sees `visible_step` more
  int visible_step;
  float* y;         // (rows, width)
  int64_t y_stride;
  float *top, *sum;  // (rows,): the largest score, and the sum of exp(score - top)
  const int32_t* places = nullptr;  // (keys,): which of k and v each key is; nullptr: as they lie. Few rows alone
};
constexpr int ATTEND_WIDTH = 256;
constexpr int ATTEND_KEYS = 64;   // of one panel
constexpr int ATTEND_ROWS = 96;   // at most in one task
constexpr int SPLIT_KEYS = 128;   // keys of one task when there is one row a head
constexpr size_t WORK = 65536;    // floats of a thread's scratch: the most that gemm and attend need

// Error-compensating rounding of all input channels for one group of outputs; spqt_cli/fit/compensate.py defines it.
struct Compensate {
  float* errors;        // (inputs, group_size): targets, replaced by target - rounded
  const float* factor;  // (inputs, inputs): unit upper triangular
  uint8_t* codes;       // (inputs, group_size)
  float *scales, *biases;  // (inputs,): exact in `type`; NaN where none is finite
  int inputs, group_size, bits;
  Type type;
};

constexpr int SLOPE_INPUTS = 32;      // of one task
constexpr int SLOPE_ROWS = 12;        // rows of dy are padded to whole tiles of an instruction set: of 12 or 6
constexpr int MOST_SLOPE_ROWS = 960;  // of one task: x and dx of its inputs are in its scratch
constexpr int slope_rows(int rows) { return (rows + SLOPE_ROWS - 1) / SLOPE_ROWS * SLOPE_ROWS; }

// Slopes of a layer, back from those by its outputs, for SLOPE_INPUTS inputs or the last ones and MOST_SLOPE_ROWS rows
// at most.
struct Slopes {
  const float* dy;  // (bands * groups of a band, slope_rows(rows), group_size), zeros in the rows that are added
  const float* x;   // (rows, inputs)
  const float* w;   // (bands, inputs, band)
  float* dx;        // (rows, inputs): sums over outputs of dy * w
  float* dots;      // (bands, inputs, groups of a band): sums over rows and a group's outputs of x * dy * w
  int rows, inputs, bands, band, group_size;
  int first;        // input of the task
  bool adds;        // dots holds those of other rows, and is added to
};

// Nothing can be said of what lies in the memory that a kernel is given to work in or to write to.

struct Kernels {
  const char* name;
  // What a channel costs 2, 4 or 8 rows together, in channels of one row.
  double (*together)(int rows, int bits);
  // Lists the active channels; returns their number. channel, x: room for `inputs`.
  int (*collect)(const Input&, int32_t* channel, float* x);
  // Those that any of some rows needs. in: the first row, in order, the others `row_stride` bytes apart. x: (inputs,
  // padded), padded 2, 4 or 8: 0 where a row skips the channel or is none; counts: (rows,), what each keeps.
  int (*collect_rows)(const Input& in, int64_t row_stride, int rows, int padded, int32_t* channel, float* x,
                      uint32_t* counts);
  // partial: the sums over `Active`, in the kernel's own order; the same bits for a row beside others as alone.
  void (*gemv)(const Tile&, const Active&, float* partial);
  // y from `stripes` partial results that lie partial_size apart; adds them up in the first.
  void (*finish)(const Tile&, float* partials, int stripes, const Output&);
  // work: WORK floats, here and below
  void (*gemm)(const Gemm&, float* work);
  // x in the order in which `rows` unpacks codes, and its sums by group.
  void (*prepare)(const Input&, int bits, int group_size, float* prepared, float* group_sums);
  // scales: room for one row's, and PADDING more; the same bits for a row of x beside others as alone
  void (*rows)(const Rows&, float* scales);
  void (*rms_norm)(const Norm&);
  void (*rope)(const Rope&);
  // silu(gate) * up, in gate
  void (*gate)(float* gate, const float* up, int n);
  // The largest of n values, and the sum of exp(value - largest); NaN in both where a value is NaN.
  void (*sum_exp)(const float* x, int n, float* largest, float* sum);
  // Few rows that see every key (at most SPLIT_KEYS): y is not divided by `sum`, so that parts can be joined.
  void (*attend_few)(const Attend&, float* work);
  // Up to ATTEND_ROWS rows: y is the finished result.
  void (*attend_many)(const Attend&, float* work);
  // The same bits with every instruction set.
  void (*compensate)(const Compensate&, float* work);
  void (*slopes)(const Slopes&, float* work);
};

// Those for matrices in MLX's own layout. What an instruction set's object defines is constinit, as are its tables:
// what would be computed when the library is loaded would run on machines that lack the instructions.
struct HeadKernels {
  decltype(Kernels::prepare) prepare;
  decltype(Kernels::rows) rows;
};

constexpr const char* ISAS[] = {"avx512vnni", "avx512", "avx2", "baseline"};  // widest first; the last is SSE2 or NEON

// Whether products of one row take codes as subnormal floats, which changes no bit of them (subnormal.h).
enum Subnormals : int { MEASURED, NEVER, ALWAYS };  // where a measurement says that it costs nothing, or
int subnormals();
void use_subnormals(int wish);
void count_subnormal();  // a tile that was multiplied so
int64_t subnormal_tiles();

// The best table for this machine, or the one chosen by use_isa.
const Kernels& kernels();
// Whether this machine and build have a table of that name.
bool has_isa(const char* name);
// Chooses a table by name; false if there is none.
bool use_isa(const char* name);
