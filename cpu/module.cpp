// What Python sees: `spqt_cli._cpu`. spqt_cli/backends/cpu.py is its only user.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "block.h"
#include "chain.h"
#include "dense.h"
#include "fit.h"
#include "kernels.h"
#include "mlx/version.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"
#include "zigzag.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
  m.def("mlx_version", [] {
    return std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
        std::to_string(MLX_VERSION_PATCH);
  });
  m.def("running_mlx_version", [] { return std::string(mlx::core::version()); });  // of the library loaded
  nb::class_<spqt::SparseStep>(m, "SparseStep")
      .def(nb::init<const std::vector<spqt::Projection>&>())
      .def("__call__", &spqt::SparseStep::operator(), nb::arg(), nb::arg().none());
  m.def("sparse_gemv", [](const mlx::core::array& x, const std::vector<spqt::Projection>& projections) {
    return spqt::SparseStep(projections)(x, std::nullopt);
  });
  nb::class_<spqt::ExpertsStep>(m, "ExpertsStep")
      .def(nb::init<const std::vector<spqt::Projection>&>())
      .def("__call__", &spqt::ExpertsStep::operator(), nb::arg(), nb::arg(), nb::arg().none());
  nb::class_<spqt::GatedStep>(m, "GatedStep")
      .def(nb::init<const std::vector<spqt::Projection>&, const spqt::Projection&>())
      .def("__call__", &spqt::GatedStep::operator(), nb::arg(), nb::arg().none(), nb::arg().none());
  nb::class_<spqt::HeadStep>(m, "HeadStep")
      .def(nb::init<const mlx::core::array&, float, const std::vector<spqt::Projection>&>())
      .def("__call__", &spqt::HeadStep::operator(), nb::arg(), nb::arg().none());
  nb::class_<spqt::TailStep>(m, "TailStep")
      .def(nb::init<const spqt::Projection&, const mlx::core::array&, float, const std::vector<spqt::Projection>&,
                    const spqt::Projection&>())
      .def("__call__", &spqt::TailStep::operator());
  nb::class_<spqt::MiddleStep>(m, "MiddleStep")
      .def(nb::init<const spqt::Projection&, const mlx::core::array&, float>())
      .def("__call__", &spqt::MiddleStep::operator());
  m.def("zigzag_matmul", &spqt::zigzag_matmul, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg(), nb::arg());
  m.def("experts_matmul", &spqt::experts_matmul, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
  m.def("row_matmul", &spqt::row_matmul, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg());
  m.def("rms_norm", &spqt::rms_norm, nb::arg(), nb::arg().none(), nb::arg());
  m.def("swiglu", &spqt::swiglu);
  m.def("log_sum_exp", &spqt::log_sum_exp);
  m.def("rope", &spqt::rope, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg().none());
  m.def("attention", &spqt::attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("compensate", &spqt::compensate);
  m.def("slopes", &spqt::slopes);
  nb::class_<spqt::TokenStep>(m, "TokenStep")
      .def("__init__",
           [](spqt::TokenStep* self, int heads, int key_heads, float scale, int dims, bool traditional,
              std::optional<float> base, float rope_scale, const std::optional<mlx::core::array>& freqs) {
             new (self) spqt::TokenStep(heads, key_heads, scale,
                                        spqt::rope_form(dims, traditional, base, rope_scale, freqs));
           },
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none())
      .def("__call__", &spqt::TokenStep::operator(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg().none() = nb::none(), nb::arg().none() = nb::none());
  nb::class_<spqt::ChainStep>(m, "ChainStep")
      .def(nb::init<std::vector<spqt::ChainStep::Block>>())
      .def("takes", &spqt::ChainStep::takes, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
      .def("__call__", &spqt::ChainStep::operator(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
           nb::arg().none());
  // Of the value that an array has now: another one once it was changed in place.
  m.def("identity", [](const mlx::core::array& a) { return (uintptr_t)a.id(); });
  // The same arrays as other objects: what is done in place to those is not done to these.
  m.def("held", [](const std::vector<mlx::core::array>& arrays) { return arrays; });
  m.def("same", [](nb::list dicts, nb::list keys, nb::list values) {
    for (size_t i = 0; i < dicts.size(); ++i) {
      PyObject* found = PyDict_GetItemWithError(nb::handle(dicts[i]).ptr(), nb::handle(keys[i]).ptr());
      if (!found && PyErr_Occurred()) throw nb::python_error();
      if (found != nb::handle(values[i]).ptr() && (found || !nb::handle(values[i]).is_none())) return false;
    }
    return true;
  });
  m.def("set_threads", &set_threads);
  m.def("threads", &threads);
  m.def("isas", [] {  // those that this machine can execute, widest first
    std::vector<std::string> found;
    for (const char* name : ISAS)
      if (has_isa(name)) found.push_back(name);
    return found;
  });
  m.def("isa", [] { return kernels().name; });
  m.def("use_subnormals", [](std::optional<bool> wish) { use_subnormals(!wish ? MEASURED : *wish ? ALWAYS : NEVER); },
        nb::arg().none());
  m.def("subnormal_tiles", &subnormal_tiles);
  m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
  m.def("is_poisoned", [] {  // whether memory is NaN when a task is handed it, seen in the memory itself
    const float *first = thread_work(), *last = first + WORK - 1;
    return *first != *first && *last != *last;
  });
}
