#include <pybind11/numpy.h>

#include "bind/bind.h"
#include "host/ngram_trie.h"

namespace stretto {
namespace {

using Ids = py::array_t<int32_t, py::array::c_style>;  // stretto.cache.NgramTrie has checked type, rank and range

py::array_t<int32_t> to_numpy(const std::vector<int32_t>& v) { return py::array_t<int32_t>(static_cast<py::ssize_t>(v.size()), v.data()); }

// The suffix of a query comes straight from a list, once a step: checked here.
py::tuple query(NgramTrie& trie, const std::vector<int64_t>& suffix, int budget, int max_depth, int mode, int shape, int64_t request) {
  require(!suffix.empty(), "NgramTrie.query", "suffix", "empty, expected at least one token");
  std::vector<int32_t> ids;
  for (int64_t token : suffix) {
    require(token >= 0 && token < trie.config().vocab_size, "NgramTrie.query", "suffix",
            "token " + std::to_string(token) + ", expected 0 to " + std::to_string(trie.config().vocab_size - 1));
    ids.push_back(static_cast<int32_t>(token));
  }
  NgramDraft draft;
  {
    py::gil_scoped_release nogil;
    draft = trie.query(ids.data(), static_cast<int64_t>(ids.size()), budget, max_depth, static_cast<NgramMode>(mode), static_cast<NgramShape>(shape),
                       request);
  }
  return py::make_tuple(to_numpy(draft.tokens), to_numpy(draft.parent));
}

py::dict stats(const NgramTrie& trie) {
  const NgramStats s = trie.stats();
  py::dict d;
  for (const auto& [name, value] : {std::pair{"nodes", s.nodes},
                                    {"trees", s.trees},
                                    {"bytes", s.bytes},
                                    {"requests", s.requests},
                                    {"evicted_trees", s.evicted_trees},
                                    {"squeezed_trees", s.squeezed_trees},
                                    {"queries", s.queries},
                                    {"hits", s.hits},
                                    {"drafted", s.drafted}})
    d[name] = value;
  return d;
}

}  // namespace

STRETTO_BIND(trie) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<NgramTrie>(m, "NgramTrie", "See stretto.cache.NgramTrie.")
      .def(py::init([](int branch_length, int max_query_length, int64_t max_bytes, int32_t vocab_size, uint32_t max_tree_nodes,
                       std::vector<int32_t> eos, std::vector<int32_t> stop_tokens) {
             return std::make_unique<NgramTrie>(
                 NgramConfig{branch_length, max_query_length, max_bytes, vocab_size, max_tree_nodes, std::move(eos), std::move(stop_tokens)});
           }),
           py::kw_only(), py::arg("branch_length"), py::arg("max_query_length"), py::arg("max_bytes"), py::arg("vocab_size"),
           py::arg("max_tree_nodes"), py::arg("eos"), py::arg("stop_tokens"))
      .def("insert_input",
           [](NgramTrie& t, int64_t request, const Ids& ids) {
             const int32_t* data = ids.data();
             const int64_t n = ids.size();
             py::gil_scoped_release nogil;
             t.insert_input(request, data, n);
           })
      .def("extend_output",
           [](NgramTrie& t, int64_t request, const Ids& ids) {
             const int32_t* data = ids.data();
             const int64_t n = ids.size();
             py::gil_scoped_release nogil;
             t.extend_output(request, data, n);
           })
      .def("insert_output",
           [](NgramTrie& t, const Ids& ids) {
             const int32_t* data = ids.data();
             const int64_t n = ids.size();
             py::gil_scoped_release nogil;
             t.insert_output(data, n);
           })
      .def("release", &NgramTrie::release, Release())
      .def("query", &query)
      .def("count", [](const NgramTrie& t, const Ids& ids, int64_t request) { return t.count(ids.data(), ids.size(), request); })
      .def("stats", &stats)
      .def("dump",
           [](const NgramTrie& t) {
             std::vector<int32_t> words;
             {
               py::gil_scoped_release nogil;
               words = t.dump();
             }
             return to_numpy(words);
           })
      .def("restore", [](NgramTrie& t, const Ids& words) {
        const int32_t* data = words.data();
        const int64_t n = words.size();
        py::gil_scoped_release nogil;
        return t.restore(data, n);
      });
}

}  // namespace stretto
