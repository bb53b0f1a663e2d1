// A driver library with the entry points that the CUDA backend calls, for tests on machines without a GPU.
//
// This tests a protocol, not a GPU: nothing here is device code and no speed means anything. "Device memory" is
// host memory filled with rubbish; a "launch" runs the toy model of toy_step.cpp. Work in a stream waits until
// somebody synchronises, so a missing wait, or a buffer changed too early, shows. Every call is logged; what
// breaks the driver's rules is noted in `violations`. Struct layouts are those of cuda.h.
#include "fake_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTER(...) if (int failed = enter(__VA_ARGS__)) return failed

EXPORT int cuInit(unsigned) {
    ENTER(NOTHING, "cuInit");
    fake.initialised = true;
    return fake.settings["devices"] ? OK : NO_DEVICE;
}
EXPORT int cuDriverGetVersion(int* version) { return *version = int(fake.settings["version"]), OK; }
EXPORT int cuDeviceGetCount(int* count) { ENTER(NOTHING, "cuDeviceGetCount"); return *count = int(fake.settings["devices"]), OK; }
EXPORT int cuDeviceGet(int* device, int ordinal) { ENTER(NOTHING, "cuDeviceGet", ordinal); return *device = ordinal, OK; }
EXPORT int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size_t(size), "Fake GPU"), OK; }
EXPORT int cuDeviceTotalMem(size_t* bytes, int) { return *bytes = size_t(fake.settings["memory"]), OK; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    const std::map<int, const char*> known{{75, "major"}, {76, "minor"}, {16, "sms"}, {97, "shared"}, {95, "cooperative"}};
    if (!known.count(attribute)) return violate("unknown device attribute" + join(attribute)), INVALID_VALUE;
    return *value = int(fake.settings[known.at(attribute)]), OK;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
    ENTER(NOTHING, "cuDevicePrimaryCtxRetain");
    return fake.contexts++, *context = &fake, OK;
}
EXPORT int cuDevicePrimaryCtxRelease(int) {
    ENTER(NOTHING, "cuDevicePrimaryCtxRelease");
    return fake.contexts-- > 0 ? OK : INVALID_CONTEXT;
}
EXPORT int cuCtxPushCurrent(void* context) {
    ENTER(NOTHING, "cuCtxPushCurrent");
    if (context != &fake || !fake.contexts) return violate("pushed a context that is not retained"), INVALID_CONTEXT;
    return stack.push_back(context), OK;
}
EXPORT int cuCtxPopCurrent(void** context) {
    ENTER(CURRENT, "cuCtxPopCurrent");
    return *context = stack.back(), stack.pop_back(), OK;
}
EXPORT int cuCtxSynchronize() {
    ENTER(NO_CAPTURE, "cuCtxSynchronize");
    drain(fake.null_stream);
    for (void* stream : fake.streams) drain(static_cast<Stream*>(stream)->queue);
    return OK;
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
    ENTER(NO_CAPTURE, "cuModuleLoadData");
    std::istringstream words(static_cast<const char*>(image));
    auto made = std::make_unique<Module>();
    std::string entries, params;
    if (!(words >> made->arch >> entries >> params) || made->arch.rfind("sm_", 0)) return INVALID_IMAGE;
    if (std::atoi(made->arch.c_str() + 3) / 10 != fake.settings["major"]) return NO_BINARY;
    for (auto& name : split(entries.substr(entries.find('=') + 1))) made->functions[name] = {made.get(), name};
    made->params = split(params.substr(params.find('=') + 1));
    return fake.modules.insert(*module = made.release()), OK;
}
EXPORT int cuModuleUnload(void* module) { ENTER(NO_CAPTURE, "cuModuleUnload"); return destroy<Module>(fake.modules, module, "module"); }
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER(CURRENT, "cuModuleGetFunction", name);
    auto& functions = static_cast<Module*>(module)->functions;
    auto found = functions.find(name);
    return found == functions.end() ? int(NOT_FOUND) : (*function = &found->second, int(OK));
}
EXPORT int cuFuncGetAttribute(int* value, int attribute, void*) {
    ENTER(CURRENT, "cuFuncGetAttribute", attribute);
    return *value = int(fake.settings["threads"]), attribute == 0 ? OK : INVALID_VALUE;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER(CURRENT, "cuFuncSetAttribute", attribute, value);
    if (attribute != 8 || value > fake.settings["shared"]) return INVALID_VALUE;
    return static_cast<Function*>(function)->shared_allowed = value, OK;
}
EXPORT int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    ENTER(CURRENT, "cuFuncGetParamInfo", index);
    auto& params = static_cast<Function*>(function)->module->params;
    if (index >= params.size()) return INVALID_VALUE;
    return *offset = 8 * index, *size = params[index] == "records" || params[index] == "chunks" ? 4 : 8, OK;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int block, size_t shared) {
    ENTER(CURRENT, "cuOccupancyMaxActiveBlocksPerMultiprocessor", block, shared);
    if (int(shared) > static_cast<Function*>(function)->shared_allowed) violate("occupancy asked before the shared memory was allowed");
    return *blocks = int(fake.settings["per_sm"]), OK;
}

EXPORT int cuMemGetInfo(size_t* free, size_t* total) {
    ENTER(CURRENT, "cuMemGetInfo");
    *free = *total = size_t(fake.settings["memory"]);
    for (auto& [at, size] : fake.memory) *free -= size;
    return OK;
}
EXPORT int cuMemAlloc(Ptr* at, size_t size) {
    ENTER(NO_CAPTURE, "cuMemAlloc", size);
    size_t free = 0, total = 0;
    cuMemGetInfo(&free, &total);
    if (!size) return INVALID_VALUE;
    if (size > free || (fake.settings.count("largest") && int64_t(size) > fake.settings["largest"])) return OUT_OF_MEMORY;
    void* memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
    std::memset(memory, 0xA5, size);
    return fake.memory[*at = Ptr(memory)] = size, OK;
}
EXPORT int cuMemFree(Ptr at) {
    ENTER(NO_CAPTURE, "cuMemFree");
    for (void* stream : fake.streams) drain(static_cast<Stream*>(stream)->queue);
    if (!fake.memory.erase(at)) return violate("freed memory that is not allocated"), INVALID_VALUE;
    return std::free(reinterpret_cast<void*>(at)), OK;
}
EXPORT int cuMemHostRegister(void* at, size_t size, unsigned) { ENTER(NO_CAPTURE, "cuMemHostRegister", size); return fake.pinned[Ptr(at)] = size, OK; }
EXPORT int cuMemHostUnregister(void* at) {
    ENTER(NO_CAPTURE, "cuMemHostUnregister");
    return fake.pinned.erase(Ptr(at)) ? OK : (violate("unregistered memory that is not registered"), INVALID_VALUE);
}
EXPORT int cuMemcpyHtoD(Ptr to, const void* from, size_t size) {
    ENTER(NO_CAPTURE, "cuMemcpyHtoD", size);
    if (int wrong = check_device("cuMemcpyHtoD", to, size)) return wrong;
    // The source is read at once, but what arrives may be later than the return, and in no other stream's order.
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), size);
    fake.null_stream.push_back([=] { std::memcpy(reinterpret_cast<void*>(to), staged->data(), size); });
    return OK;
}
EXPORT int cuMemcpyHtoDAsync(Ptr to, const void* from, size_t size, void* stream) {
    ENTER(CURRENT, "cuMemcpyHtoDAsync", size);
    if (int wrong = check_device("cuMemcpyHtoDAsync", to, size)) return wrong;
    if (int wrong = check_pinned("cuMemcpyHtoDAsync", from, size)) return wrong;
    return submit(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, size); });
}
EXPORT int cuMemcpyDtoHAsync(void* to, Ptr from, size_t size, void* stream) {
    ENTER(CURRENT, "cuMemcpyDtoHAsync", size);
    if (int wrong = check_device("cuMemcpyDtoHAsync", from, size)) return wrong;
    if (int wrong = check_pinned("cuMemcpyDtoHAsync", to, size)) return wrong;
    return submit(stream, [=] { std::memcpy(to, reinterpret_cast<void*>(from), size); });
}
EXPORT int cuMemcpyDtoDAsync(Ptr to, Ptr from, size_t size, void* stream) {
    ENTER(CURRENT, "cuMemcpyDtoDAsync", size);
    if (int wrong = check_device("cuMemcpyDtoDAsync", to, size)) return wrong;
    if (int wrong = check_device("cuMemcpyDtoDAsync", from, size)) return wrong;
    return submit(stream, [=] { fake.clock += double(size) * 5e-7; });  // a bandwidth probe reads nothing back
}
EXPORT int cuMemsetD8Async(Ptr at, unsigned char value, size_t size, void* stream) {
    ENTER(CURRENT, "cuMemsetD8Async", int(value), size);
    if (int wrong = check_device("cuMemsetD8Async", at, size)) return wrong;
    return submit(stream, [=] { std::memset(reinterpret_cast<void*>(at), value, size); });
}
EXPORT int cuMemsetD2D8Async(Ptr at, size_t pitch, unsigned char value, size_t width, size_t height, void* stream) {
    ENTER(CURRENT, "cuMemsetD2D8Async", pitch, int(value), width, height);
    if (!height || width > pitch) return INVALID_VALUE;
    if (int wrong = check_device("cuMemsetD2D8Async", at, pitch * (height - 1) + width)) return wrong;
    return submit(stream, [=] {
        for (size_t row = 0; row < height; row++) std::memset(reinterpret_cast<void*>(at + pitch * row), value, width);
    });
}

EXPORT int cuStreamCreate(void** stream, unsigned flags) {
    ENTER(NO_CAPTURE, "cuStreamCreate", flags);
    return fake.streams.insert(*stream = new Stream), OK;
}
EXPORT int cuStreamDestroy(void* stream) { ENTER(NO_CAPTURE, "cuStreamDestroy"); return destroy<Stream>(fake.streams, stream, "stream"); }
EXPORT int cuStreamSynchronize(void* stream) {
    ENTER(NO_CAPTURE, "cuStreamSynchronize");
    if (!fake.streams.count(stream)) return INVALID_HANDLE;
    drain(static_cast<Stream*>(stream)->queue);
    return fake.violations.empty() ? OK : LAUNCH_FAILED;  // or the host would wait for tokens that no kernel makes
}
EXPORT int cuStreamBeginCapture(void* stream, int mode) {
    ENTER(NO_CAPTURE, "cuStreamBeginCapture", mode);
    if (!fake.streams.count(stream)) return INVALID_HANDLE;
    return static_cast<Stream*>(stream)->capturing = true, OK;
}
EXPORT int cuStreamEndCapture(void* stream, void** graph) {
    ENTER(CURRENT, "cuStreamEndCapture");
    auto* s = static_cast<Stream*>(stream);
    if (!s->capturing) return violate("ended a capture that did not begin"), INVALID_VALUE;
    s->capturing = false;
    fake.graphs.insert(*graph = new Graph{std::move(s->captured)});
    return s->captured.clear(), OK;
}

EXPORT int cuLaunchKernelEx(const Config* c, void* function, void** params, void**) {
    ENTER(CURRENT, "cuLaunchKernelEx", "grid", c->grid[0], c->grid[1], c->grid[2], "block", c->block[0], c->block[1], c->block[2], "shared", c->shared);
    auto* module = static_cast<Function*>(function)->module;
    bool cooperative = false;
    for (unsigned i = 0; i < c->count; i++) cooperative |= c->attributes[i].id == 2 && c->attributes[i].cooperative == 1;
    fake.log.push_back("launched" + join(static_cast<Function*>(function)->name, cooperative ? "cooperatively" : "alone"));
    if (cooperative && c->grid[0] > fake.settings["sms"] * fake.settings["per_sm"]) return TOO_LARGE;
    if (int(c->shared) > static_cast<Function*>(function)->shared_allowed) return violate("launched with more shared memory than allowed"), INVALID_VALUE;
    std::map<std::string, uint64_t> args;
    for (size_t i = 0; i < module->params.size(); i++)
        std::memcpy(&args[module->params[i]], params[i], module->params[i] == "records" || module->params[i] == "chunks" ? 4 : 8);
    return submit(c->stream, [=, grid = c->grid[0]] { execute(module, args, grid, cooperative); });
}
EXPORT int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    ENTER(CURRENT, "cuGraphInstantiate");
    if (!fake.graphs.count(graph)) return INVALID_HANDLE;
    return fake.execs.insert(*exec = new Graph(*static_cast<Graph*>(graph))), OK;
}
EXPORT int cuGraphUpload(void* exec, void*) { ENTER(CURRENT, "cuGraphUpload"); return fake.execs.count(exec) ? OK : INVALID_HANDLE; }
EXPORT int cuGraphLaunch(void* exec, void* stream) {
    ENTER(CURRENT, "cuGraphLaunch");
    if (!fake.execs.count(exec)) return violate("replayed a graph that is not instantiated"), INVALID_HANDLE;
    auto jobs = static_cast<Graph*>(exec)->jobs;
    return submit(stream, [jobs] { for (auto& job : jobs) job(); });
}
EXPORT int cuGraphDestroy(void* graph) { ENTER(NOTHING, "cuGraphDestroy"); return destroy<Graph>(fake.graphs, graph, "graph"); }
EXPORT int cuGraphExecDestroy(void* exec) { ENTER(NOTHING, "cuGraphExecDestroy"); return destroy<Graph>(fake.execs, exec, "executable graph"); }

EXPORT int cuEventCreate(void** event, unsigned) { ENTER(CURRENT, "cuEventCreate"); return fake.events.insert(*event = new Event), OK; }
EXPORT int cuEventDestroy(void* event) { ENTER(CURRENT, "cuEventDestroy"); return destroy<Event>(fake.events, event, "event"); }
EXPORT int cuEventRecordWithFlags(void* event, void* stream, unsigned flags) {
    ENTER(CURRENT, "cuEventRecordWithFlags", flags);
    if (!fake.events.count(event) || !fake.streams.count(stream)) return INVALID_HANDLE;
    if (static_cast<Stream*>(stream)->capturing != bool(flags)) violate("an event is external in a capture, and nowhere else");
    return submit(stream, [=] { static_cast<Event*>(event)->at = fake.clock; });
}
EXPORT int cuEventRecord(void* event, void* stream) { return cuEventRecordWithFlags(event, stream, 0); }
EXPORT int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    ENTER(CURRENT, "cuEventElapsedTime");
    auto *a = static_cast<Event*>(from), *b = static_cast<Event*>(to);
    if (a->at < 0 || b->at < 0) return violate("asked for the time of an event that was not recorded"), INVALID_HANDLE;
    return *milliseconds = float(b->at - a->at), OK;
}

EXPORT int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
#define ENTRY(symbol) {#symbol, reinterpret_cast<void*>(symbol)}
    static const std::map<std::string, void*> known{
        ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetName),
        ENTRY(cuDeviceTotalMem), ENTRY(cuDeviceGetAttribute), ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuDevicePrimaryCtxRelease),
        ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent), ENTRY(cuCtxSynchronize), ENTRY(cuModuleLoadData), ENTRY(cuModuleUnload),
        ENTRY(cuModuleGetFunction), ENTRY(cuFuncGetAttribute), ENTRY(cuFuncSetAttribute), ENTRY(cuFuncGetParamInfo),
        ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor), ENTRY(cuMemGetInfo), ENTRY(cuMemAlloc), ENTRY(cuMemFree),
        ENTRY(cuMemHostRegister), ENTRY(cuMemHostUnregister), ENTRY(cuMemcpyHtoD), ENTRY(cuMemcpyHtoDAsync), ENTRY(cuMemcpyDtoHAsync),
        ENTRY(cuMemcpyDtoDAsync), ENTRY(cuMemsetD8Async), ENTRY(cuMemsetD2D8Async),
        ENTRY(cuStreamCreate), ENTRY(cuStreamDestroy), ENTRY(cuStreamSynchronize),
        ENTRY(cuStreamBeginCapture), ENTRY(cuStreamEndCapture), ENTRY(cuLaunchKernelEx), ENTRY(cuGraphInstantiateWithFlags),
        ENTRY(cuGraphUpload), ENTRY(cuGraphLaunch), ENTRY(cuGraphDestroy), ENTRY(cuGraphExecDestroy), ENTRY(cuEventCreate),
        ENTRY(cuEventDestroy), ENTRY(cuEventRecord), ENTRY(cuEventRecordWithFlags), ENTRY(cuEventElapsedTime), ENTRY(cuGetProcAddress_v2),
    };
    auto found = known.find(std::string(name) == "cuGetProcAddress" ? "cuGetProcAddress_v2" : name);
    *function = found == known.end() ? nullptr : found->second;
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}

// What the tests look at.
EXPORT void fake_reset() { fake = Fake{}; stack.clear(); }
EXPORT void fake_set(const char* name, int64_t value) { fake.settings[name] = value; }
EXPORT const char* fake_take(int violations) {  // the log, or the violations, one a line; and forget them
    auto& lines = violations ? fake.violations : fake.log;
    fake.text.clear();
    for (auto& line : lines) fake.text += line + "\n";
    return lines.clear(), fake.text.c_str();
}
EXPORT int fake_live() {  // what was made and not given back
    return int(fake.memory.size() + fake.pinned.size() + fake.modules.size() + fake.streams.size() + fake.graphs.size() +
               fake.execs.size() + fake.events.size() + stack.size()) + fake.contexts;
}
