// What a host must be able to rely on, tried as a plug-in does it: the library is opened with RTLD_LOCAL at run time.
//
//     checks LIBRARY MODEL OPTIONS SESSION
//
// OPTIONS is the inside of a JSON object that begins with num_frames and has no seed. Prints a line for each finding,
// which test_embed.py reads. Exits with 1 where a promise of miga_embed.h is broken.

#include "miga_embed.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cinttypes>
#include <clocale>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

void require(bool holds, const char *promise) {
    if (holds) return;
    std::fprintf(stderr, "checks: broken: %s\n", promise);
    std::exit(1);
}

template <typename Function>
Function symbol(void *library, const char *name) {
    void *address = dlsym(library, name);
    require(address != nullptr, name);
    return reinterpret_cast<Function>(address);
}

struct Api {
    decltype(&miga_open) open;
    decltype(&miga_resume) resume;
    decltype(&miga_replay) replay;
    decltype(&miga_set_prompt) set_prompt;
    decltype(&miga_set_guidance_scale) set_guidance_scale;
    decltype(&miga_get_info) get_info;
    decltype(&miga_next_frame) next_frame;
    decltype(&miga_cancel) cancel;
    decltype(&miga_save) save;
    decltype(&miga_close) close;
    decltype(&miga_last_error) last_error;
};
Api api;

using Frame = std::vector<uint8_t>;

uint64_t checksum(const Frame &bytes) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3;
    return hash;
}

miga_run *opened(const char *model, const std::string &options) {
    miga_run *run = api.open(model, options.c_str());
    if (run == nullptr) std::fprintf(stderr, "checks: %s\n", api.last_error());
    require(run != nullptr, "a run opens");
    return run;
}

Frame frame_for(miga_run *run) {
    miga_video_info info;
    require(api.get_info(run, &info) == 0, "an open run has its sizes");
    return Frame(static_cast<size_t>(info.width) * info.height * 3);
}

int next(miga_run *run, Frame &frame) { return api.next_frame(run, frame.data(), frame.size(), 0); }

std::vector<uint64_t> rest(miga_run *run) {
    Frame frame = frame_for(run);
    std::vector<uint64_t> sums;
    int answer;
    while ((answer = next(run, frame)) == 1) sums.push_back(checksum(frame));
    require(answer == 0, "a video ends with 0");
    return sums;
}

void print_sentence(const char *name, bool is_refused) {
    require(is_refused, name);
    std::printf("%s: %s\n", name, api.last_error());
}

volatile std::sig_atomic_t num_interrupts = 0;

std::array<struct sigaction, 32> signal_actions() {
    std::array<struct sigaction, 32> actions{};
    for (int number = 1; number < 32; ++number) sigaction(number, nullptr, &actions[number]);
    return actions;
}

void refusals(const char *model, const std::string &inside) {
    const std::string options = "{" + inside + "}";
    require(std::strlen(api.last_error()) == 0, "there is no error before the first");
    print_sentence("no model", api.open(nullptr, options.c_str()) == nullptr);
    print_sentence("absent model", api.open("/absent/model", options.c_str()) == nullptr);
    print_sentence("no prompt", api.open(model, nullptr) == nullptr);
    print_sentence("bad JSON", api.open(model, "{\"prompt\": ") == nullptr);
    print_sentence("no UTF-8", api.open(model, "{\"prompt\": \"\xff\xfe\"}") == nullptr);
    print_sentence("unknown option", api.open(model, ("{\"sede\": 1, " + inside + "}").c_str()) == nullptr);
    print_sentence("absent session", api.resume("/absent/file.safetensors", nullptr) == nullptr);
    int anything = 0;
    miga_run *forged = reinterpret_cast<miga_run *>(&anything);
    print_sentence("forged handle", api.next_frame(forged, nullptr, 0, 0) == -1);
    print_sentence("no handle", api.save(nullptr, "/tmp/x.safetensors") == -1);
    api.cancel(nullptr);
    api.close(nullptr);
}

void buffers_and_end(const char *model, const std::string &inside) {
    miga_run *run = opened(model, "{" + inside + "}");
    miga_video_info info;
    require(api.get_info(run, &info) == 0, "an open run has its sizes");
    std::printf("info: %d %d %d %" PRId64 " %" PRId64 "\n", info.width, info.height, info.fps, info.num_frames,
                info.first_frame);
    Frame tight = frame_for(run);
    print_sentence("no info", api.get_info(run, nullptr) == -1);
    print_sentence("no buffer", api.next_frame(run, nullptr, tight.size(), 0) == -1);
    print_sentence("small buffer", api.next_frame(run, tight.data(), tight.size() - 1, 0) == -1);
    print_sentence("short rows", api.next_frame(run, tight.data(), tight.size(), 3 * info.width - 1) == -1);
    print_sentence("absent folder", api.save(run, "/absent/folder/run.safetensors") == -1);

    // The first frame with padded rows and a guard behind it, all of which must stay as it is.
    const size_t row = 3 * info.width, row_bytes = row + 5, needed = row_bytes * (info.height - 1) + row;
    Frame padded(needed + 7, 0xa5);
    require(api.next_frame(run, padded.data(), needed, row_bytes) == 1, "a refused buffer costs no frame");
    Frame first;
    for (size_t i = 0; i < padded.size(); ++i) {
        const bool is_pixel = i < needed && i % row_bytes < row;
        if (is_pixel) first.push_back(padded[i]);
        else require(padded[i] == 0xa5, "padding is not written");
    }
    std::printf("frame: %016" PRIx64 "\n", checksum(first));
    for (const uint64_t sum : rest(run)) std::printf("frame: %016" PRIx64 "\n", sum);
    require(next(run, tight) == 0 && next(run, tight) == 0, "after its end a video stays at its end");
    api.close(run);
    print_sentence("closed handle", next(run, tight) == -1);
    api.cancel(run);
    api.close(run);
}

void two_threads(const char *model, const std::string &inside) {
    std::array<std::vector<uint64_t>, 2> sums;
    std::array<std::thread, 2> threads;
    for (size_t seed = 0; seed < 2; ++seed)
        threads[seed] = std::thread([&, seed] {
            miga_run *run = opened(model, "{\"seed\": " + std::to_string(seed) + ", " + inside + "}");
            sums[seed] = rest(run);
            api.close(run);
        });
    for (std::thread &thread : threads) thread.join();
    for (size_t seed = 0; seed < 2; ++seed)
        for (const uint64_t sum : sums[seed]) std::printf("seed %zu: %016" PRIx64 "\n", seed, sum);
}

// Cancelled while this thread holds Python's lock, which is what a pass holds at its worst.
void cancel_save_resume(const char *model, const std::string &inside, const char *session) {
    miga_run *run = opened(model, "{" + inside + "}");
    Frame frame = frame_for(run);
    for (int i = 0; i < 3; ++i) {
        require(next(run, frame) == 1, "a frame comes");
        std::printf("before: %016" PRIx64 "\n", checksum(frame));
    }
    const auto ensure = symbol<int (*)()>(RTLD_DEFAULT, "PyGILState_Ensure");
    const auto release = symbol<void (*)(int)>(RTLD_DEFAULT, "PyGILState_Release");
    const int state = ensure();
    std::thread([&] { api.cancel(run); }).join();
    release(state);
    for (const uint64_t sum : rest(run)) std::printf("before: %016" PRIx64 "\n", sum);
    require(api.save(run, session) == 0, "a cancelled run can be saved");
    api.close(run);
    run = api.resume(session, nullptr);
    if (run == nullptr) std::fprintf(stderr, "checks: %s\n", api.last_error());
    require(run != nullptr, "a saved run resumes");
    for (const uint64_t sum : rest(run)) std::printf("after: %016" PRIx64 "\n", sum);
    api.close(run);
}

// Told things by another thread than the one that pulls; the replay of its session is what was seen.
void steer_and_replay(const char *model, const std::string &inside, const char *session) {
    miga_run *run = opened(model, "{" + inside + "}");
    std::thread([&] {
        require(api.set_prompt(run, "a blue kite", "{\"above\": 0, \"blend\": 4}") == 0, "a prompt can be changed");
        require(api.set_prompt(run, "green hills", "{\"at\": 20}") == 0, "and one for later");
        require(api.set_guidance_scale(run, 2.5, nullptr) == 0, "so can the scale of guidance");
        require(api.set_prompt(run, "", nullptr) == -1 && *api.last_error() != '\0', "an empty prompt is refused");
        require(api.set_prompt(run, "\xff", nullptr) == -1, "a prompt that is no UTF-8 is refused");
        require(api.set_prompt(run, "a kite", "{\"when\": 3}") == -1, "an unknown option is refused");
        require(api.set_prompt(run, nullptr, nullptr) == -1, "a missing prompt is refused");
    }).join();
    const auto seen = rest(run);
    for (const uint64_t sum : seen) std::printf("steered: %016" PRIx64 "\n", sum);
    require(api.save(run, session) == 0, "a run that was told things can be saved");
    api.close(run);
    run = api.replay(session, nullptr);
    if (run == nullptr) std::fprintf(stderr, "checks: %s\n", api.last_error());
    require(run != nullptr, "a session can be replayed");
    require(rest(run) == seen, "a replay is what was seen");
    api.close(run);
}

// An endless video, cancelled and then closed by other threads than the one that waits for its frames.
void end_from_another_thread(const char *model, const std::string &inside) {
    for (const bool is_closed : {false, true}) {
        miga_run *run = opened(model, "{\"num_frames\": null, " + inside.substr(inside.find(',') + 1) + "}");
        std::atomic<int> num_frames{0}, last{1};
        std::thread puller([&] {
            Frame frame = frame_for(run);
            while ((last = next(run, frame)) == 1) ++num_frames;
        });
        while (num_frames < 3) std::this_thread::yield();
        if (is_closed) api.close(run);
        else api.cancel(run);
        puller.join();
        require(last == 0 || is_closed, "a cancelled video ends with 0");
        api.close(run);
    }
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) std::fprintf(stderr, "checks: %s\n", dlerror());
    require(library != nullptr, "the library loads");
    require(symbol<decltype(&miga_abi)>(library, "miga_abi")() == MIGA_ABI, "header and library agree");
    std::printf("version: %s\n", symbol<decltype(&miga_version)>(library, "miga_version")());
    api = {symbol<decltype(&miga_open)>(library, "miga_open"),
           symbol<decltype(&miga_resume)>(library, "miga_resume"),
           symbol<decltype(&miga_replay)>(library, "miga_replay"),
           symbol<decltype(&miga_set_prompt)>(library, "miga_set_prompt"),
           symbol<decltype(&miga_set_guidance_scale)>(library, "miga_set_guidance_scale"),
           symbol<decltype(&miga_get_info)>(library, "miga_get_info"),
           symbol<decltype(&miga_next_frame)>(library, "miga_next_frame"),
           symbol<decltype(&miga_cancel)>(library, "miga_cancel"),
           symbol<decltype(&miga_save)>(library, "miga_save"),
           symbol<decltype(&miga_close)>(library, "miga_close"),
           symbol<decltype(&miga_last_error)>(library, "miga_last_error")};
    const char *model = argv[2], *session = argv[4];
    const std::string inside = argv[3];

    std::signal(SIGINT, [](int) { num_interrupts = num_interrupts + 1; });
    const auto actions = signal_actions();
    const std::string locale = std::setlocale(LC_ALL, nullptr);
    refusals(model, inside);
    buffers_and_end(model, inside);
    two_threads(model, inside);
    cancel_save_resume(model, inside, session);
    steer_and_replay(model, inside, session);
    end_from_another_thread(model, inside);
    const auto actions_now = signal_actions();
    for (int number = 1; number < 32; ++number)
        require(actions[number].sa_handler == actions_now[number].sa_handler, "signal handlers are the host's");
    std::raise(SIGINT);
    require(num_interrupts == 1, "an interrupt is the host's");
    require(locale == std::setlocale(LC_ALL, nullptr), "the locale is the host's");
    std::string sentence;
    std::thread([&] { sentence = api.last_error(); }).join();
    require(sentence.empty(), "errors are those of one thread");
    // A handle left open at exit must not stop the process from ending.
    Frame frame = frame_for(opened(model, "{" + inside + "}"));
    return 0;
}
