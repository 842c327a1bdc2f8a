// Python's door to sampler.hpp: checks shapes and types, keeps the arrays alive, frees the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "sampler.hpp"

namespace py = pybind11;

namespace {

// No conversion: a converted copy would be written to and thrown away.
using Array = py::array_t<std::int64_t, py::array::c_style>;

regmix::Table table_of(const Array& table) {
    if (table.ndim() != 2 || table.shape(0) != regmix::Table::kRows || table.shape(1) < 1)
        throw std::invalid_argument("table must be int64 [6, D]");
    return {table.data(), table.shape(1)};
}

regmix::Dealing dealing_of(Array& dealing, const regmix::Table& table) {
    if (dealing.ndim() != 2 || dealing.shape(0) != regmix::Dealing::kRows ||
        dealing.shape(1) != table.num_domains)
        throw std::invalid_argument("dealing must be int64 [5, D]");
    return {dealing.mutable_data(), table.num_domains};
}

void advance(const Array& table_array, Array& dealing_array, std::int64_t first,
             std::int64_t num) {
    const regmix::Table table = table_of(table_array);
    regmix::Dealing dealing = dealing_of(dealing_array, table);
    py::gil_scoped_release unlocked;
    regmix::advance(table, dealing, first, num);
}

void order(const Array& table_array, Array& dealing_array, std::int64_t first,
           std::uint64_t step_key, Array& domains, Array& sequences) {
    const regmix::Table table = table_of(table_array);
    regmix::Dealing dealing = dealing_of(dealing_array, table);
    if (domains.ndim() != 1 || sequences.ndim() != 1 || domains.size() != sequences.size())
        throw std::invalid_argument("domains and sequences must be int64 [N]");
    const std::int64_t num = domains.size();
    std::int64_t *domains_out = domains.mutable_data(), *sequences_out = sequences.mutable_data();
    py::gil_scoped_release unlocked;
    regmix::order(table, dealing, first, step_key, num, domains_out, sequences_out);
}

class Gather {
  public:
    Gather(std::vector<std::vector<py::array>> arrays, std::int64_t seq_len)
        : arrays_(std::move(arrays)), gatherer_(spans_of(arrays_), seq_len) {
        if (seq_len < 1) throw std::invalid_argument("seq_len must be at least 1");
    }

    void fill(const Array& domains, const Array& sequences, Array& out) const {
        const std::int64_t num = domains.size();
        if (sequences.size() != num || out.ndim() != 2 || out.shape(0) != num ||
            out.shape(1) != gatherer_.length())
            throw std::invalid_argument("out must be int64 [N, T+1]");
        std::int64_t* tokens = out.mutable_data();
        const std::int64_t *domain = domains.data(), *sequence = sequences.data();
        py::gil_scoped_release unlocked;
        gatherer_.fill(domain, sequence, num, tokens);
    }

  private:
    static std::vector<std::vector<regmix::Span>> spans_of(
        const std::vector<std::vector<py::array>>& arrays) {
        std::vector<std::vector<regmix::Span>> domains;
        for (const auto& files : arrays) {
            std::vector<regmix::Span> spans;
            std::int64_t end = 0;
            for (const py::array& tokens : files) {
                const bool wide = py::isinstance<py::array_t<std::uint32_t>>(tokens);
                if (!wide && !py::isinstance<py::array_t<std::uint16_t>>(tokens))
                    throw std::invalid_argument("tokens must be uint16 or uint32");
                if (tokens.ndim() != 1 || !(tokens.flags() & py::array::c_style))
                    throw std::invalid_argument("tokens must be one-dimensional and contiguous");
                end += tokens.size();
                spans.push_back({tokens.data(), wide, tokens.size(), end});
            }
            domains.push_back(std::move(spans));
        }
        return domains;
    }

    std::vector<std::vector<py::array>> arrays_;  // keeps the tokens mapped
    regmix::Gatherer gatherer_;
};

}  // namespace

PYBIND11_MODULE(_sampler, module) {
    module.doc() = "The data order and the gathering of tokens; see csrc/sampler.hpp.";
    module.attr("ORDER_VERSION") = regmix::kOrderVersion;
    module.def("advance", &advance, py::arg("table").noconvert(), py::arg("dealing").noconvert(),
               py::arg("first"), py::arg("num"));
    module.def("order", &order, py::arg("table").noconvert(), py::arg("dealing").noconvert(),
               py::arg("first"), py::arg("step_key"), py::arg("domains").noconvert(),
               py::arg("sequences").noconvert());
    py::class_<Gather>(module, "Gather")
        .def(py::init<std::vector<std::vector<py::array>>, std::int64_t>(), py::arg("arrays"),
             py::arg("seq_len"))
        .def("fill", &Gather::fill, py::arg("domains").noconvert(),
             py::arg("sequences").noconvert(), py::arg("out").noconvert());
}
