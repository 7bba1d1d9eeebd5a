// Times llama.cpp's work on request, so that a benchmark can take turns with it. One command a line:
//   mul OUTPUTS INPUTS THREADS         microseconds of one Q4_0 product, weights in its default (repacked) form
//   load MODEL.gguf                    "ok"
//   quantize MODEL.gguf<tab>OUT.gguf   "ok"; OUT is of Q4_0
//   decode TOKENS DEPTH THREADS        tokens per second after DEPTH tokens of context
//   prompt TOKENS THREADS              tokens per second
#include <algorithm>
#include <chrono>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llama.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

ggml_threadpool* pool_of(int threads) {
  static ggml_threadpool* pools[257] = {};
  if (!pools[threads]) {
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    pools[threads] = ggml_threadpool_new(&params);
  }
  return pools[threads];
}

// the buffer type llama.cpp prefers for Q4_0 weights on this machine
ggml_backend_buffer_type_t weight_buffers() {
  ggml_backend_reg_t reg = ggml_backend_cpu_reg();
  auto extra = (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(
      reg, "ggml_backend_dev_get_extra_bufts");
  ggml_backend_buffer_type_t* types = extra ? extra(ggml_backend_reg_dev_get(reg, 0)) : nullptr;
  for (; types && *types; ++types)
    if (std::strstr(ggml_backend_buft_name(*types), "REPACK")) return *types;
  return ggml_backend_cpu_buffer_type();
}

// Copies of one product, enough that no weight is still in a cache when its turn comes again.
struct Products {
  int outputs = 0, inputs = 0, copies = 0;
  ggml_context *weights = nullptr, *graph_context = nullptr;
  ggml_backend_buffer_t weight_buffer = nullptr, data_buffer = nullptr;
  ggml_cgraph* graph = nullptr;

  void free() {
    if (!weights) return;
    ggml_backend_buffer_free(weight_buffer);
    ggml_backend_buffer_free(data_buffer);
    ggml_free(weights);
    ggml_free(graph_context);
  }

  void make(int m, int k) {
    free();
    outputs = m, inputs = k;
    const size_t bytes = ggml_row_size(GGML_TYPE_Q4_0, k) * m;
    copies = std::max<int>(4, (192u << 20) / bytes);
    weights = ggml_init({ggml_tensor_overhead() * (copies + 1), nullptr, true});
    graph_context = ggml_init({ggml_tensor_overhead() * (copies + 2) + ggml_graph_overhead_custom(copies + 8, false),
                               nullptr, true});
    ggml_tensor* x = ggml_new_tensor_1d(graph_context, GGML_TYPE_F32, k);
    graph = ggml_new_graph_custom(graph_context, copies + 8, false);
    std::vector<ggml_tensor*> all;
    for (int i = 0; i < copies; ++i) {
      all.push_back(ggml_new_tensor_2d(weights, GGML_TYPE_Q4_0, k, m));
      ggml_build_forward_expand(graph, ggml_mul_mat(graph_context, all.back(), x));
    }
    weight_buffer = ggml_backend_alloc_ctx_tensors_from_buft(weights, weight_buffers());
    data_buffer = ggml_backend_alloc_ctx_tensors_from_buft(graph_context, ggml_backend_cpu_buffer_type());
    std::vector<unsigned char> codes(bytes);
    unsigned state = 1;
    for (size_t i = 0; i < bytes; ++i) codes[i] = (state = state * 1664525u + 1013904223u) >> 24;
    for (size_t i = 0; i < bytes; i += 18) codes[i] = 0, codes[i + 1] = 0x20;  // scale 2^-7 of every block
    for (ggml_tensor* w : all) ggml_backend_tensor_set(w, codes.data(), 0, bytes);
    std::vector<float> values(k);
    for (float& v : values) v = (int)((state = state * 1664525u + 1013904223u) >> 16) / 32768.0f - 1.0f;
    ggml_backend_tensor_set(x, values.data(), 0, k * sizeof(float));
  }
};

double multiply(int outputs, int inputs, int threads) {
  static Products products;
  static ggml_backend_t backend = ggml_backend_cpu_init();
  if (products.outputs != outputs || products.inputs != inputs) products.make(outputs, inputs);
  ggml_backend_cpu_set_threadpool(backend, pool_of(threads));
  ggml_backend_cpu_set_n_threads(backend, threads);
  const auto start = Clock::now();
  ggml_backend_graph_compute(backend, products.graph);
  return seconds_since(start) / products.copies * 1e6;
}

struct Model {
  llama_model* model = nullptr;
  llama_context* context = nullptr;

  bool load(const std::string& path) {
    llama_model_params params = llama_model_default_params();
    model = llama_model_load_from_file(path.c_str(), params);
    if (!model) return false;
    llama_context_params with = llama_context_default_params();
    with.n_ctx = 4096;
    with.n_batch = with.n_ubatch = 512;
    with.no_perf = true;
    context = llama_init_from_model(model, with);
    return context != nullptr;
  }

  void use(int threads) {
    llama_attach_threadpool(context, pool_of(threads), pool_of(threads));
    llama_set_n_threads(context, threads, threads);
    llama_memory_clear(llama_get_memory(context), true);
  }

  void feed(int tokens) {
    std::vector<llama_token> some(tokens);
    for (int i = 0; i < tokens; ++i) some[i] = 100 + i % 1000;
    for (int i = 0; i < tokens; i += 512)
      llama_decode(context, llama_batch_get_one(some.data() + i, std::min(512, tokens - i)));
  }

  double prompt(int tokens, int threads) {
    use(threads);
    const auto start = Clock::now();
    feed(tokens);
    return tokens / seconds_since(start);
  }

  double decode(int tokens, int depth, int threads) {
    use(threads);
    feed(depth);
    llama_token next = 100;
    const int words = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const auto start = Clock::now();
    for (int i = 0; i < tokens; ++i) {
      llama_decode(context, llama_batch_get_one(&next, 1));
      const float* logits = llama_get_logits_ith(context, -1);
      next = std::max_element(logits, logits + words) - logits;
    }
    return tokens / seconds_since(start);
  }
};

}  // namespace

int main() {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  Model model;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command, path;
    int a = 0, b = 0, c = 0;
    words >> command;
    if (command == "load") {
      std::getline(words >> std::ws, path);
      std::cout << (model.load(path) ? "ok" : "failed") << std::endl;
    } else if (command == "quantize") {
      std::string output;
      std::getline(std::getline(words >> std::ws, path, '\t'), output);
      llama_model_quantize_params params = llama_model_quantize_default_params();
      params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
      params.allow_requantize = true;
      std::cout << (llama_model_quantize(path.c_str(), output.c_str(), &params) ? "failed" : "ok") << std::endl;
    } else if (command == "mul" && words >> a >> b >> c) {
      std::cout << multiply(a, b, c) << std::endl;
    } else if (command == "decode" && words >> a >> b >> c) {
      std::cout << model.decode(a, b, c) << std::endl;
    } else if (command == "prompt" && words >> a >> b) {
      std::cout << model.prompt(a, b) << std::endl;
    } else {
      std::cout << "unknown command" << std::endl;
    }
  }
}
