// The base of the primitives that stand in for MLX's own: MLX's version is what gradients, vmap and jvp use.
#pragma once

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "mlx/transforms.h"

namespace spqt {

class Native : public mlx::core::Primitive {
 public:
  using Arrays = std::vector<mlx::core::array>;
  using Fallback = std::function<Arrays(const Arrays&)>;

  Native(mlx::core::Stream stream, Fallback fallback) : Primitive(stream), fallback_(std::move(fallback)) {}

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[spqt] The CPU extension was called on another device.");
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&)
      override {
    return mlx::core::vjp(of_some(primals, argnums), some(primals, argnums), cotangents).second;
  }

  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    return mlx::core::jvp(of_some(primals, argnums), some(primals, argnums), tangents).second;
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    auto outputs = mlx::core::vmap(fallback_, axes)(inputs);
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }

 private:
  static Arrays some(const Arrays& all, const std::vector<int>& which) {
    Arrays chosen;
    for (int i : which) chosen.push_back(all[i]);
    return chosen;
  }

  // the fallback as a function of some arguments: packed codes have no gradient to ask for
  Fallback of_some(const Arrays& primals, const std::vector<int>& argnums) const {
    return [fallback = fallback_, primals, argnums](const Arrays& values) {
      Arrays all = primals;
      for (size_t i = 0; i < argnums.size(); ++i) all[argnums[i]] = values[i];
      return fallback(all);
    };
  }

  Fallback fallback_;
};

}  // namespace spqt
