#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "page_pool.h"

namespace py = pybind11;

namespace kelix::host {
namespace {

// Data of a C-contiguous, aligned, 2-D array of exactly type T; never a converted copy.
template <typename T>
void RequireMatrix(const py::array& array, const char* name, const char* dtype) {
  const auto fail = [&](const std::string& got) {
    throw py::value_error(std::string(name) + " must be a C-contiguous 2-D " + dtype +
                          " array, got " + got);
  };
  if (!py::dtype::of<T>().equal(array.dtype())) {
    fail("dtype " + py::cast<std::string>(py::str(array.dtype())));
  }
  if (array.ndim() != 2) fail(std::to_string(array.ndim()) + " dimensions");
  constexpr int kContiguous = py::array::c_style;
  constexpr int kAligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!(array.flags() & kContiguous) || !(array.flags() & kAligned)) {
    fail("a strided or unaligned view; use numpy.ascontiguousarray");
  }
}

Rows ReadRows(const PagePool& pool, const py::array& array) {
  RequireMatrix<int64_t>(array, "rows", "int64");
  if (array.shape(1) != pool.row_width()) {
    throw py::value_error("rows must have shape [S, row_width=" + std::to_string(pool.row_width()) +
                          "], got [" + std::to_string(array.shape(0)) + ", " +
                          std::to_string(array.shape(1)) + "]");
  }
  return {static_cast<const int64_t*>(array.data()), array.shape(0)};
}

template <typename T>
py::array_t<T> ToArray(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple MatchPrefix(const PagePool& pool, const py::array& rows) {
  const Match match = pool.MatchPrefix(ReadRows(pool, rows));
  return py::make_tuple(ToArray(match.pages), match.num_rows);
}

std::pair<SequenceId, int64_t> Add(PagePool& pool, const std::optional<py::array>& rows) {
  return pool.Add(rows ? ReadRows(pool, *rows) : Rows{});
}

int64_t Commit(PagePool& pool, SequenceId id, const py::array& rows) {
  return pool.Commit(id, ReadRows(pool, rows));
}

void WritePageTables(const PagePool& pool, const std::vector<SequenceId>& ids, py::array out) {
  RequireMatrix<int32_t>(out, "out", "int32");
  const auto height = static_cast<size_t>(out.shape(0));
  if (ids.size() > height) {
    throw py::value_error("out must have a row for each of the " + std::to_string(ids.size()) +
                          " sequences, got " + std::to_string(height));
  }
  auto* data = static_cast<int32_t*>(out.mutable_data());  // raises ValueError when read-only
  pool.WritePageTables(ids, {data, static_cast<size_t>(out.size())}, out.shape(1));
}

void TranslateUnknownSequence(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const UnknownSequence& error) {
    py::set_error(PyExc_KeyError, error.what());
  }
}

}  // namespace
}  // namespace kelix::host

PYBIND11_MODULE(_host, module) {
  using namespace kelix::host;
  module.doc() = "Page pool and prefix cache of the paged KV cache.";
  py::register_local_exception_translator(&TranslateUnknownSequence);
  py::class_<PagePool>(module, "PagePool")
      .def(py::init<int64_t, int64_t, int64_t, int>(), py::arg("num_pages"), py::arg("page_size"),
           py::arg("row_width"), py::kw_only(), py::arg("hash_bits") = 64)
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("row_width", &PagePool::row_width)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("num_cached", &PagePool::num_cached)
      .def_property_readonly("num_used", &PagePool::num_used)
      .def_property_readonly("num_available", &PagePool::num_available)
      .def_property_readonly("num_sequences", &PagePool::num_sequences)
      .def("match_prefix", &MatchPrefix, py::arg("rows"))
      .def("add", &Add, py::arg("rows") = py::none())
      .def("grow", &PagePool::Grow, py::arg("seq"), py::arg("num_rows"))
      .def("commit", &Commit, py::arg("seq"), py::arg("rows"))
      .def("release", &PagePool::Release, py::arg("seq"))
      .def("num_rows", &PagePool::NumRows, py::arg("seq"))
      .def("num_committed", &PagePool::NumCommitted, py::arg("seq"))
      .def(
          "page_table",
          [](const PagePool& pool, SequenceId id) { return ToArray(pool.PageTable(id)); },
          py::arg("seq"))
      .def("write_page_tables", &WritePageTables, py::arg("seqs"), py::arg("out"))
      .def("reset_cache", &PagePool::ResetCache)
      .def("check", &PagePool::Check);
}
