// What fake_cuda.cpp stands on: handles, streams that wait, the rules it checks, and the toy kernel.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "toy_step.cpp"

namespace {
enum Result {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500,
    LAUNCH_FAILED = 719, TOO_LARGE = 720, CAPTURE_UNSUPPORTED = 900,
};
using Job = std::function<void()>;
using Ptr = uint64_t;

struct Attribute { int id; int pad; union { char bytes[64]; int cooperative; }; };
struct Config { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned count; };

// A fake cubin is text: "sm_90 entry=few,many params=table,control,..".
struct Module;
struct Function { Module* module; std::string name; int shared_allowed = 0; };
struct Module { std::string arch; std::map<std::string, Function> functions; std::vector<std::string> params; };
struct Stream { std::vector<Job> queue, captured; bool capturing = false; };
struct Graph { std::vector<Job> jobs; };
struct Event { double at = -1; };  // milliseconds of the fake's clock

struct Fake {
    std::map<std::string, int64_t> settings{{"devices", 1}, {"major", 9}, {"minor", 0}, {"sms", 132}, {"per_sm", 1},
        {"shared", 232448}, {"memory", int64_t(80) << 30}, {"version", 13000}, {"cooperative", 1}, {"threads", 1024}};
    std::vector<std::string> log, violations;
    std::map<Ptr, size_t> memory, pinned;
    std::set<void*> modules, streams, graphs, execs, events;
    std::vector<Job> null_stream;  // copies from memory that is not page-locked end here
    int contexts = 0;
    double clock = 0;  // milliseconds: copies take 1 ms for 2 MB, kernels 1 ms a record
    bool initialised = false;
    std::string text;
};
Fake fake;
thread_local std::vector<void*> stack;  // current contexts of a thread

void violate(const std::string& what) { fake.violations.push_back(what); }

template <class... T> std::string join(T... values) {
    std::ostringstream out;
    ((out << ' ' << values), ...);
    return out.str();
}

// Logs a call; nonzero if it must fail: by request (`fail NAME` = code), or because it may not be made now.
enum Needs { NOTHING, CURRENT, NO_CAPTURE };
template <class... T> int enter(Needs needs, const char* name, T... values) {
    fake.log.push_back(name + join(values...));
    auto asked = fake.settings.find(std::string("fail ") + name);
    if (asked != fake.settings.end() && asked->second) return int(asked->second);
    if (!fake.initialised && std::strcmp(name, "cuInit")) return NOT_INITIALIZED;
    if (needs != NOTHING && stack.empty()) return violate(std::string(name) + ": no current context"), INVALID_CONTEXT;
    for (void* stream : fake.streams)
        if (needs == NO_CAPTURE && static_cast<Stream*>(stream)->capturing)
            return violate(std::string(name) + ": not allowed while capturing"), CAPTURE_UNSUPPORTED;
    return OK;
}

bool inside(const std::map<Ptr, size_t>& blocks, Ptr at, size_t size) {
    auto after = blocks.upper_bound(at);
    if (after == blocks.begin()) return false;
    auto block = std::prev(after);
    return at >= block->first && at + size <= block->first + block->second;
}

int check_device(const char* name, Ptr at, size_t size) {
    if (size && inside(fake.memory, at, size)) return OK;
    return violate(name + std::string(": not device memory:") + join(at, size)), INVALID_VALUE;
}

int check_pinned(const char* name, const void* at, size_t size) {
    if (inside(fake.pinned, Ptr(at), size)) return OK;
    return violate(name + std::string(": asynchronous copy of memory that is not page-locked")), INVALID_VALUE;
}

void drain(std::vector<Job>& queue) {
    auto jobs = std::move(queue);
    queue.clear();
    for (auto& job : jobs) job();
}

int submit(void* stream, Job job) {
    if (!fake.streams.count(stream)) return violate("not a stream"), INVALID_HANDLE;
    auto* s = static_cast<Stream*>(stream);
    (s->capturing ? s->captured : s->queue).push_back(std::move(job));
    return OK;
}

template <class T> int destroy(std::set<void*>& live, void* handle, const char* what) {
    if (!live.erase(handle)) return violate(std::string("not a live ") + what), INVALID_HANDLE;
    return delete static_cast<T*>(handle), OK;
}

uint64_t sum(Ptr at) {  // of the whole block that starts there
    uint64_t total = 0;
    for (size_t i = 0; i < fake.memory[at]; i++) total += reinterpret_cast<uint8_t*>(at)[i];
    return total;
}

std::vector<std::string> split(const std::string& text) {
    std::istringstream list(text);
    std::vector<std::string> parts;
    for (std::string one; std::getline(list, one, ',');) parts.push_back(one);
    return parts;
}

// The records of a launch, walked as the workers would: do all waits end, and is this the launch that commits?
struct Walk {
    int32_t mark = 0, records = 0, waits = 0;  // body of the record that commits: 1000 x bucket + workers
    std::map<int32_t, int32_t> signals;
    int32_t fault[6] = {};

    Walk(const int32_t* table, unsigned grid, unsigned length, const int32_t* control) {
        each(table, grid, length, [&](unsigned, unsigned, const int32_t* r) {
            records++;
            if (r[0] >= 1000) mark = r[0];
            if (r[WORD_signal] >= 0) signals[r[WORD_signal]]++;
        });
        each(table, grid, length, [&](unsigned worker, unsigned number, const int32_t* r) {
            for (int word : {WORD_wait0, WORD_wait1}) {
                if (r[word] < 0) continue;
                int32_t seen = control[64 + 32 * r[word]] + signals[r[word]], expected = (control[0] + 1) * r[word + 1];
                waits++;
                if (seen >= expected || fault[0]) continue;
                int32_t found[] = {1, int32_t(worker), int32_t(number), r[word], seen, expected};
                std::memcpy(fault, found, sizeof fault);
            }
        });
    }
    template <class F> static void each(const int32_t* table, unsigned grid, unsigned length, F use) {
        for (unsigned w = 0; w < grid; w++)
            for (unsigned i = 0; i < length && table[(w * length + i) * 32] >= 0; i++) use(w, i, table + (w * length + i) * 32);
    }
};

// What the kernel does on its device: the arguments as they were at the launch, memory as it is now.
void execute(Module* module, std::map<std::string, uint64_t> args, unsigned grid, bool cooperative) {
    if (!fake.modules.count(module)) return violate("a graph ran after its module was unloaded");
    for (auto& [name, value] : args) {
        bool null = name == "global_scratch" || name == "profile_scratch";
        size_t size = name == "table" ? size_t(128) * grid * args["records"] : name == "stream" ? size_t(8) * grid * args["chunks"] : 1;
        if (name != "records" && name != "chunks" && (null ? value != 0 : !inside(fake.memory, value, size)))
            return violate("kernel argument " + name + " is no device memory");
    }
    auto* control = reinterpret_cast<int32_t*>(args["control"]);
    Toy toy{};
    toy.m.state = reinterpret_cast<uint8_t*>(args["state"]);
    toy.m.workspace = reinterpret_cast<uint8_t*>(args["workspace"]);
    for (int g = 0; g < GROUPS; g++) toy.m.kv[g] = reinterpret_cast<uint8_t*>(args["kv" + std::to_string(g)]);
    int32_t rows = *toy.field<int32_t>(AT_n_rows);
    Walk walk(reinterpret_cast<int32_t*>(args["table"]), grid, unsigned(args["records"]), control);
    fake.clock += walk.records;
    fake.log.push_back("kernel" + join("grid", grid, "table", walk.mark, "records", args["records"], "rows", rows, "epoch", control[0]));
    if (!control[0] && walk.mark) fake.log.push_back("first" + join("weights", sum(args["weights"]), "workspace", sum(args["workspace"])));
    if (walk.waits && !cooperative) violate("workers that wait for each other were launched without the cooperative attribute");
    if (control[8] || !rows) return;
    if (walk.fault[0]) return void(std::memcpy(control + 8, walk.fault, sizeof walk.fault));
    // After n steps an event has n signals of every producer of this bucket's table.
    for (auto& [event, producers] : walk.signals) {
        int32_t& counter = control[64 + 32 * event];
        if (counter != control[0] * producers) violate("a counter does not match the epoch: this step would hang");
        counter += producers;
    }
    if (!walk.mark) return;
    if (toy.step()) {
        std::memcpy(control + 8, toy.field<int32_t>(AT_fault), 32);
        std::memset(toy.field<int32_t>(AT_fault), 0, 32);
    }
    control[0]++;
}
}  // namespace
