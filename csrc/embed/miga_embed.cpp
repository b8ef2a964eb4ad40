// The C interface: starts or finds Python, and passes each call on to miga_engine/integrations/embed.py.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "miga_embed.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>

namespace {

thread_local std::string last_error;

struct Decref {
    void operator()(PyObject *object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Decref>;

class PythonLock {
public:
    PythonLock() : state_(PyGILState_Ensure()) {}
    ~PythonLock() { PyGILState_Release(state_); }
    PythonLock(const PythonLock &) = delete;
    PythonLock &operator=(const PythonLock &) = delete;

private:
    PyGILState_STATE state_;
};

// Both are dropped with Python's lock held: by Run's destructor, or by forget().
struct Run {
    Object object;
    Py_buffer is_cancelled{};
    miga_video_info info{};

    ~Run() {
        PythonLock lock;
        if (is_cancelled.obj != nullptr) PyBuffer_Release(&is_cancelled);
        object.reset();
    }
};

// A handle is a number that is never given twice. Neither is destroyed at exit, when Python may be gone; the mutex is
// never held while Python's lock is waited for.
std::mutex &runs_mutex = *new std::mutex;
std::map<uintptr_t, std::shared_ptr<Run>> &runs = *new std::map<uintptr_t, std::shared_ptr<Run>>;
uintptr_t last_handle = 0;

miga_run *enter(std::shared_ptr<Run> run) {
    std::lock_guard<std::mutex> guard(runs_mutex);
    runs.emplace(++last_handle, std::move(run));
    return reinterpret_cast<miga_run *>(last_handle);
}

std::shared_ptr<Run> find(miga_run *handle, bool is_removed = false) {
    std::lock_guard<std::mutex> guard(runs_mutex);
    const auto place = runs.find(reinterpret_cast<uintptr_t>(handle));
    if (place == runs.end()) {
        last_error = "the handle is not open: use one that miga_open or miga_resume gave and miga_close has not seen";
        return nullptr;
    }
    std::shared_ptr<Run> run = place->second;
    if (is_removed) runs.erase(place);
    return run;
}

std::string text(PyObject *object) {
    const Object string(object == nullptr ? nullptr : PyObject_Str(object));
    const char *characters = string ? PyUnicode_AsUTF8(string.get()) : nullptr;
    std::string result = characters == nullptr ? "an error without words" : characters;
    PyErr_Clear();
    return result;
}

// Takes Python's pending error as a sentence, and with it whatever its traceback held.
std::string take_python_error() {
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    const Object owned_type(type), owned_value(value), owned_trace(trace);
    const Object embed(value == nullptr ? nullptr : PyImport_ImportModule("miga_engine.integrations.embed"));
    const Object sentence(embed ? PyObject_CallMethod(embed.get(), "sentence", "O", value) : nullptr);
    PyErr_Clear();
    return text(sentence ? sentence.get() : value);
}

// Extension modules look for Python's symbols among the global ones, where a library that was itself loaded with
// RTLD_LOCAL, as plug-ins are, has not brought them.
void make_libpython_global() {
    Dl_info place;
    if (dladdr(reinterpret_cast<void *>(&Py_IsInitialized), &place) != 0 && place.dli_fname != nullptr)
        dlopen(place.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

bool initialize_python() {
    const char *asked = std::getenv("MIGA_PYTHON");
    const std::string program = asked != nullptr && *asked != '\0' ? asked : MIGA_BUILD_PYTHON;
    const std::string remedy =
        ": set MIGA_PYTHON to the python " + std::string(MIGA_PYTHON_VERSION) + " of an environment with miga_engine";
    if (access(program.c_str(), X_OK) != 0) {
        last_error = "there is no Python at " + program + remedy;
        return false;
    }
    make_libpython_global();
    struct sigaction interrupt;
    sigaction(SIGINT, nullptr, &interrupt);
    PyPreConfig preconfig;
    PyPreConfig_InitIsolatedConfig(&preconfig);
    preconfig.utf8_mode = 1;  // whatever the host's locale is
    PyStatus status = Py_PreInitialize(&preconfig);
    if (!PyStatus_Exception(status)) {
        PyConfig config;
        PyConfig_InitIsolatedConfig(&config);
        // The interpreter finds its environment from where its executable lies.
        status = PyConfig_SetBytesString(&config, &config.program_name, program.c_str());
        if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
        PyConfig_Clear(&config);
    }
    if (PyStatus_Exception(status)) {
        last_error = "Python " MIGA_PYTHON_VERSION " does not start with " + program + " (" +
                     (status.err_msg == nullptr ? "no reason given" : status.err_msg) + ")" + remedy;
        return false;
    }
    // Python's signal module takes SIGINT when it is first imported, whatever the configuration says: have that done and
    // give the signal back.
    Object signals(PyImport_ImportModule("_signal"));
    signals.reset();
    sigaction(SIGINT, &interrupt, nullptr);
    // After site-packages, so that an installed miga_engine comes before the checkout the library was built from. Empty
    // where it was built from an installed one: another environment does not mix with that.
    if (*MIGA_BUILD_ROOT != '\0') {
        PyObject *path = PySys_GetObject("path");
        const Object checkout(PyUnicode_DecodeFSDefault(MIGA_BUILD_ROOT));
        if (path != nullptr && checkout) PyList_Append(path, checkout.get());
        PyErr_Clear();
    }
    PyEval_SaveThread();
    return true;
}

bool start_python() {
    static std::atomic<bool> is_ready{false};
    static std::mutex &mutex = *new std::mutex;
    static std::string &failure = *new std::string;
    if (is_ready) return true;
    std::lock_guard<std::mutex> guard(mutex);
    if (!failure.empty()) {  // Python cannot start a second time after it failed half-way
        last_error = failure;
        return false;
    }
    if (!is_ready && !Py_IsInitialized() && !initialize_python()) {
        if (Py_IsInitialized()) failure = last_error;
        return false;
    }
    is_ready = true;
    return true;
}

// miga_engine.integrations.embed of this interface's number; null and a sentence otherwise.
Object import_embed() {
    Object embed(PyImport_ImportModule("miga_engine.integrations.embed"));
    if (!embed) {
        const std::string reason = take_python_error();
        last_error = "miga_engine cannot be imported by " + text(PySys_GetObject("executable")) + " (" + reason +
                     "): set MIGA_PYTHON to the python " MIGA_PYTHON_VERSION " of an environment that has it";
        return nullptr;
    }
    const Object number(PyObject_GetAttrString(embed.get(), "ABI"));
    if (!number || PyLong_AsLong(number.get()) != MIGA_ABI) {
        PyErr_Clear();
        last_error = "libmiga_embed.so has interface " + std::to_string(MIGA_ABI) + " and the installed miga_engine " +
                     text(number.get()) + ": build the library from the installed version";
        return nullptr;
    }
    return embed;
}

miga_run *start(const char *function, const char *what, const char *path, const char *options) {
    if (path == nullptr || *path == '\0') {
        last_error = std::string(what) + " is missing: give a text";
        return nullptr;
    }
    if (!start_python()) return nullptr;
    const auto run = std::make_shared<Run>();
    PythonLock lock;
    const Object embed = import_embed();
    if (!embed) return nullptr;
    run->object.reset(PyObject_CallMethod(embed.get(), function, "yy", path, options == nullptr ? "{}" : options));
    if (run->object) {
        const Object flag(PyObject_GetAttrString(run->object.get(), "is_cancelled"));
        const Object info(PyObject_CallMethod(run->object.get(), "info", nullptr));
        long long num_frames = 0, first_frame = 0;
        if (flag && info && PyObject_GetBuffer(flag.get(), &run->is_cancelled, PyBUF_WRITABLE) == 0 &&
            PyArg_ParseTuple(info.get(), "iiiLL", &run->info.width, &run->info.height, &run->info.fps, &num_frames,
                             &first_frame)) {
            run->info.num_frames = num_frames;
            run->info.first_frame = first_frame;
            return enter(run);
        }
    }
    last_error = take_python_error();
    return nullptr;
}

int next_frame(miga_run *handle, uint8_t *frame, size_t capacity, size_t row_bytes) {
    const std::shared_ptr<Run> run = find(handle);
    if (!run) return -1;
    if (frame == nullptr || capacity > static_cast<size_t>(PY_SSIZE_T_MAX) ||
        row_bytes > static_cast<size_t>(PY_SSIZE_T_MAX)) {
        last_error = "frame is no buffer: give memory of capacity bytes";
        return -1;
    }
    PythonLock lock;
    const Object buffer(
        PyMemoryView_FromMemory(reinterpret_cast<char *>(frame), static_cast<Py_ssize_t>(capacity), PyBUF_WRITE));
    const Object is_frame(buffer ? PyObject_CallMethod(run->object.get(), "next_frame", "On", buffer.get(),
                                                       static_cast<Py_ssize_t>(row_bytes))
                                 : nullptr);
    if (is_frame) return is_frame.get() == Py_True ? 1 : 0;
    last_error = take_python_error();
    return -1;
}

// The answer of a call whose result is of no use: 0, or -1 and Python's error. Takes the result.
int done(PyObject *result) {
    const Object owned(result);
    if (owned) return 0;
    last_error = take_python_error();
    return -1;
}

int set_prompt(miga_run *handle, const char *prompt, const char *options) {
    const std::shared_ptr<Run> run = find(handle);
    if (!run) return -1;
    if (prompt == nullptr) {
        last_error = "prompt is missing: give a text";
        return -1;
    }
    PythonLock lock;
    return done(PyObject_CallMethod(run->object.get(), "set_prompt", "yy", prompt,
                                    options == nullptr ? "{}" : options));
}

int set_guidance_scale(miga_run *handle, double guidance_scale, const char *options) {
    const std::shared_ptr<Run> run = find(handle);
    if (!run) return -1;
    PythonLock lock;
    return done(PyObject_CallMethod(run->object.get(), "set_guidance_scale", "dy", guidance_scale,
                                    options == nullptr ? "{}" : options));
}

int save(miga_run *handle, const char *path) {
    const std::shared_ptr<Run> run = find(handle);
    if (!run) return -1;
    if (path == nullptr || *path == '\0') {
        last_error = "path is missing: give a text";
        return -1;
    }
    PythonLock lock;
    return done(PyObject_CallMethod(run->object.get(), "save", "y", path));
}

void cancel(const Run &run) {
    // Python reads the byte between two passes; its lock is not needed to set it.
    __atomic_store_n(static_cast<unsigned char *>(run.is_cancelled.buf), 1, __ATOMIC_RELEASE);
}

void close(miga_run *handle) {
    const std::shared_ptr<Run> run = find(handle, /*is_removed=*/true);
    if (!run) return;
    cancel(*run);
    PythonLock lock;
    const Object closed(PyObject_CallMethod(run->object.get(), "close", nullptr));
    if (!closed) last_error = take_python_error();
}

// What memory ran out for is an answer too; nothing else here throws.
template <typename Result, typename Function>
Result guarded(Result failed, Function function) noexcept {
    try {
        return function();
    } catch (const std::exception &) {
        last_error.clear();
        try {
            last_error = "memory ran out: close other runs";
        } catch (const std::exception &) {
        }
        return failed;
    }
}

}  // namespace

extern "C" {

int miga_abi(void) noexcept { return MIGA_ABI; }

const char *miga_version(void) noexcept { return MIGA_VERSION; }

miga_run *miga_open(const char *model, const char *options) noexcept {
    return guarded<miga_run *>(nullptr, [&] { return start("open_run", "model", model, options); });
}

miga_run *miga_resume(const char *path, const char *options) noexcept {
    return guarded<miga_run *>(nullptr, [&] { return start("resume_run", "path", path, options); });
}

miga_run *miga_replay(const char *path, const char *options) noexcept {
    return guarded<miga_run *>(nullptr, [&] { return start("replay_run", "path", path, options); });
}

int miga_get_info(miga_run *run, miga_video_info *info) noexcept {
    return guarded(-1, [&] {
        const std::shared_ptr<Run> found = find(run);
        if (!found) return -1;
        if (info == nullptr) {
            last_error = "info is missing: give a miga_video_info to fill";
            return -1;
        }
        *info = found->info;
        return 0;
    });
}

int miga_next_frame(miga_run *run, uint8_t *frame, size_t capacity, size_t row_bytes) noexcept {
    return guarded(-1, [&] { return next_frame(run, frame, capacity, row_bytes); });
}

void miga_cancel(miga_run *run) noexcept {
    guarded(0, [&] {
        if (const std::shared_ptr<Run> found = find(run)) cancel(*found);
        return 0;
    });
}

int miga_set_prompt(miga_run *run, const char *prompt, const char *options) noexcept {
    return guarded(-1, [&] { return set_prompt(run, prompt, options); });
}

int miga_set_guidance_scale(miga_run *run, double guidance_scale, const char *options) noexcept {
    return guarded(-1, [&] { return set_guidance_scale(run, guidance_scale, options); });
}

int miga_save(miga_run *run, const char *path) noexcept {
    return guarded(-1, [&] { return save(run, path); });
}

void miga_close(miga_run *run) noexcept {
    guarded(0, [&] {
        if (run != nullptr) close(run);
        return 0;
    });
}

const char *miga_last_error(void) noexcept { return last_error.c_str(); }

}  // extern "C"
