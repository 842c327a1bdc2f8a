// Python's door to the data path: checks shapes and types, keeps the arrays alive, frees the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <memory>
#include <tuple>
#include <utility>
#include <variant>

#include "gather.hpp"
#include "order.hpp"
#include "ring.hpp"

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

// What batches can be made of: decided by the type of the array that receives them.
template <typename Use>
auto with_type(const py::array& out, Use&& use) {
    if (!(out.flags() & py::array::c_style) || !out.writeable())
        throw std::invalid_argument("out must be contiguous and writeable");
    if (py::isinstance<py::array_t<std::int64_t>>(out)) return use(std::int64_t{});
    if (py::isinstance<py::array_t<std::int32_t>>(out)) return use(std::int32_t{});
    if (py::isinstance<py::array_t<std::uint16_t>>(out)) return use(std::uint16_t{});
    throw std::invalid_argument("out must be int64, int32 or uint16");
}

// A check of blocks as Python describes it: see regmix/data/block_checks.py.
struct Check : regmix::BlockCheck {
    Check(const py::object& record, const py::array_t<std::uint64_t>& digests,
          const py::array_t<std::uint8_t>& states, std::int64_t num_bytes)
        : BlockCheck(record.attr("descriptor").cast<int>(),
                     record.attr("start").cast<std::int64_t>(), num_bytes, digests.data(),
                     reinterpret_cast<State*>(const_cast<std::uint8_t*>(states.data()))),
          owner(record), arrays{digests, states} {}

    py::object owner;
    std::vector<py::array> arrays;
};

std::unique_ptr<Check> check_of(const py::object& record, const py::array& tokens) {
    // No conversion: the states are written to, for all who share them.
    const py::object digests = record.attr("digests"), states = record.attr("states");
    const std::int64_t num_bytes = tokens.nbytes();
    const std::int64_t blocks = ((num_bytes - 1) >> regmix::BlockCheck::kBlockBits) + 1;
    if (!py::isinstance<py::array_t<std::uint64_t, py::array::c_style>>(digests) ||
        !py::isinstance<py::array_t<std::uint8_t, py::array::c_style>>(states) ||
        py::len(digests) != static_cast<std::size_t>(blocks) ||
        py::len(states) != static_cast<std::size_t>(blocks) ||
        !py::reinterpret_borrow<py::array>(states).writeable())
        throw std::invalid_argument("a check holds a uint64 digest and a uint8 state a block");
    return std::make_unique<Check>(record, digests, states, num_bytes);
}

// The domain, the file and the cure are known to Python.
void set_error(const regmix::BlockError& error) {
    const auto& check = static_cast<const Check&>(*error.check);
    const py::object told = check.owner.attr("error")(error.block, error.error);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(told.ptr())), told.ptr());
}

class Gather {
  public:
    std::int64_t add(const std::vector<py::array>& files, const std::vector<py::object>& checks) {
        if (!checks.empty() && checks.size() != files.size())
            throw std::invalid_argument("checks must be one a file, or none at all");
        regmix::Domain spans;
        std::vector<std::unique_ptr<Check>> kept;
        std::int64_t end = 0;
        for (std::size_t number = 0; number < files.size(); ++number) {
            const py::array& tokens = files[number];
            const bool wide = py::isinstance<py::array_t<std::uint32_t>>(tokens);
            if (!wide && !py::isinstance<py::array_t<std::uint16_t>>(tokens))
                throw std::invalid_argument("tokens must be uint16 or uint32");
            if (tokens.ndim() != 1 || !(tokens.flags() & py::array::c_style))
                throw std::invalid_argument("tokens must be one-dimensional and contiguous");
            end += tokens.size();
            spans.push_back({tokens.data(), wide, tokens.size(), end});
            if (checks.empty() || checks[number].is_none()) continue;
            kept.push_back(check_of(checks[number], tokens));
            spans.back().check = kept.back().get();
        }
        arrays_.push_back(files);
        std::move(kept.begin(), kept.end(), std::back_inserter(checks_));
        return core_->add(std::move(spans));
    }

    void fill(const Array& slots, const Array& domains, const Array& sequences,
              std::int64_t seq_len, py::array& out) const {
        const std::int64_t num = domains.size();
        if (seq_len < 1) throw std::invalid_argument("seq_len must be at least 1");
        if (sequences.size() != num || out.ndim() != 2 || out.shape(0) != num ||
            out.shape(1) != seq_len + 1)
            throw std::invalid_argument("out must be [N, T+1]");
        const std::int64_t *slot = slots.data(), *domain = domains.data(),
                           *sequence = sequences.data(), num_slots = slots.size();
        with_type(out, [&](auto kind) {
            auto* tokens = static_cast<decltype(kind)*>(out.mutable_data());
            py::gil_scoped_release unlocked;
            core_->fill(slot, num_slots, domain, sequence, num, seq_len, tokens);
        });
    }

    std::shared_ptr<const regmix::Gatherer> core() const { return core_; }

  private:
    std::vector<std::vector<py::array>> arrays_;  // keeps the tokens mapped
    std::vector<std::unique_ptr<Check>> checks_;
    std::shared_ptr<regmix::Gatherer> core_ = std::make_shared<regmix::Gatherer>();
};

std::vector<std::int64_t> values(const Array& array) {
    return {array.data(), array.data() + array.size()};
}

// (first step, table [6, D], fresh dealing [5, D])
using Segment = std::tuple<std::int64_t, Array, Array>;
// (segments, dealing [5, D], first sequence, step key, slots [D])
using Member = std::tuple<std::vector<Segment>, Array, std::int64_t, std::uint64_t, Array>;

regmix::Member member_of(const Member& member) {
    const auto& [segments, dealing, sequence, step_key, slots] = member;
    regmix::Member core{{}, values(dealing), sequence, step_key, values(slots)};
    if (segments.empty()) throw std::invalid_argument("a member has at least one segment");
    for (const auto& [first_step, table, fresh] : segments) {
        for (const Array& rows : {fresh, dealing})
            if (table_of(table).num_domains != slots.size() || rows.ndim() != 2 ||
                rows.shape(0) != regmix::Dealing::kRows || rows.shape(1) != slots.size())
                throw std::invalid_argument("table, dealing and slots must have one D");
        core.segments.push_back({first_step, values(table), values(fresh)});
    }
    return core;
}

class Ring {
  public:
    Ring(const Gather& gather, const std::vector<Member>& members, std::int64_t seq_len,
         std::int64_t batch_size, std::int64_t first_row, std::int64_t num_rows,
         std::int64_t start, std::int64_t stop, std::int64_t ahead,
         std::vector<py::array> buffers, int threads, bool assist, py::object owner)
        : buffers_(std::move(buffers)), owner_(std::move(owner)), step_(start) {
        if (seq_len < 1 || batch_size < 1 || first_row < 0 || num_rows < 1 ||
            first_row + num_rows > batch_size || start < 0 || stop < start || ahead < 0 ||
            threads < (assist ? 0 : 1) || members.empty() || buffers_.empty())
            throw std::invalid_argument("a size of the ring is out of range");
        std::vector<regmix::Member> cores;
        for (const Member& member : members) cores.push_back(member_of(member));
        const auto size = static_cast<py::ssize_t>(members.size()) * num_rows * (seq_len + 1);
        const regmix::RingShape shape{seq_len, batch_size, first_row, num_rows,
                                      start,   stop,       ahead};
        with_type(buffers_.front(), [&](auto kind) {
            using Out = decltype(kind);
            std::vector<Out*> outs;
            for (py::array& buffer : buffers_) {
                if (buffer.size() != size || !py::isinstance<py::array_t<Out>>(buffer) ||
                    !(buffer.flags() & py::array::c_style) || !buffer.writeable())
                    throw std::invalid_argument("a buffer must be [P, rows, T+1] of one type");
                outs.push_back(static_cast<Out*>(buffer.mutable_data()));
            }
            core_ = std::make_unique<regmix::Ring<Out>>(gather.core(), std::move(cores), shape,
                                                        std::move(outs), threads, assist);
        });
    }

    py::tuple next() {
        std::int64_t slot;
        {
            py::gil_scoped_release unlocked;
            slot = std::visit([](auto& ring) { return ring->take(); }, core_);
        }
        if (slot < 0) throw py::stop_iteration();
        return py::make_tuple(step_++, buffers_[static_cast<std::size_t>(slot)]);
    }

    std::int64_t num_read_ahead() const {
        return std::visit([](const auto& ring) { return ring->num_read_ahead(); }, core_);
    }

    void close() {
        py::gil_scoped_release unlocked;
        std::visit([](auto& ring) { ring->close(); }, core_);
    }

  private:
    std::vector<py::array> buffers_;
    py::object owner_;  // of the tokens
    std::int64_t step_;
    std::variant<std::unique_ptr<regmix::Ring<std::int64_t>>,
                 std::unique_ptr<regmix::Ring<std::int32_t>>,
                 std::unique_ptr<regmix::Ring<std::uint16_t>>>
        core_;
};

}  // namespace

PYBIND11_MODULE(_sampler, module) {
    module.doc() = "The data order, the gathering of tokens and the ring; see csrc/*.hpp.";
    module.attr("ORDER_VERSION") = regmix::kOrderVersion;
    module.def("advance", &advance, py::arg("table").noconvert(), py::arg("dealing").noconvert(),
               py::arg("first"), py::arg("num"));
    module.def("order", &order, py::arg("table").noconvert(), py::arg("dealing").noconvert(),
               py::arg("first"), py::arg("step_key"), py::arg("domains").noconvert(),
               py::arg("sequences").noconvert());
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const regmix::BlockError& error) {
            set_error(error);
        }
    });
    py::enum_<regmix::Isa>(module, "Isa")
        .value("scalar", regmix::Isa::scalar)
        .value("avx2", regmix::Isa::avx2)
        .value("avx512", regmix::Isa::avx512);
    module.def("isa", &regmix::isa);
    module.def("set_isa", &regmix::set_isa, "Take these vector instructions, or the best below.");
    py::class_<Gather>(module, "Gather")
        .def(py::init<>())
        .def("add", &Gather::add, py::arg("files"),
             py::arg("checks") = std::vector<py::object>())
        .def("fill", &Gather::fill, py::arg("slots").noconvert(), py::arg("domains").noconvert(),
             py::arg("sequences").noconvert(), py::arg("seq_len"), py::arg("out").noconvert());
    py::class_<Ring>(module, "Ring")
        .def(py::init([](py::object gather, const std::vector<Member>& members,
                         std::int64_t seq_len, std::int64_t batch_size, std::int64_t first_row,
                         std::int64_t num_rows, std::int64_t start, std::int64_t stop,
                         std::int64_t ahead, std::vector<py::array> buffers, int threads,
                         bool assist) {
                 return std::make_unique<Ring>(gather.cast<const Gather&>(), members, seq_len,
                                               batch_size, first_row, num_rows, start, stop,
                                               ahead, std::move(buffers), threads, assist, gather);
             }),
             py::kw_only(), py::arg("gather"), py::arg("members"), py::arg("seq_len"),
             py::arg("batch_size"), py::arg("first_row"), py::arg("num_rows"), py::arg("start"),
             py::arg("stop"), py::arg("ahead"), py::arg("buffers"), py::arg("threads"), py::arg("assist"))
        .def("__iter__", [](py::object ring) { return ring; })
        .def("__next__", &Ring::next)
        .def("close", &Ring::close)
        .def_property_readonly("num_read_ahead", &Ring::num_read_ahead);
}
