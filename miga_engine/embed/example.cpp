// Pulls frames of a video through the C interface and prints a checksum of each.
//
//     example MODEL OPTIONS                     every frame
//     example MODEL OPTIONS COUNT SESSION       COUNT frames, then a second thread cancels; what is there still comes,
//                                               the run is saved to SESSION, closed, resumed from there and finished
//
// MODEL is "tiny" or a path, OPTIONS a JSON object such as '{"prompt": "a red balloon", "num_frames": 48}'.

#include "miga_embed.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

[[noreturn]] void fail() {
    std::fprintf(stderr, "example: %s\n", miga_last_error());
    std::exit(1);
}

// FNV-1a, 64 bit.
uint64_t checksum(const std::vector<uint8_t> &bytes) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3;
    return hash;
}

miga_video_info info_of(miga_run *run) {
    miga_video_info info;
    if (miga_get_info(run, &info) != 0) fail();
    return info;
}

// Up to `most` frames, each printed as its number and checksum; how many came.
int64_t pull(miga_run *run, int64_t first, int64_t most) {
    const miga_video_info info = info_of(run);
    std::vector<uint8_t> frame(static_cast<size_t>(info.width) * info.height * 3);
    int64_t count = 0;
    while (count < most) {
        const int answer = miga_next_frame(run, frame.data(), frame.size(), 0);
        if (answer < 0) fail();
        if (answer == 0) break;
        std::printf("%" PRId64 " %016" PRIx64 "\n", first + count++, checksum(frame));
    }
    return count;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3 && argc != 5) {
        std::fprintf(stderr, "usage: %s MODEL OPTIONS [COUNT SESSION]\n", argv[0]);
        return 2;
    }
    if (miga_abi() != MIGA_ABI) {
        std::fprintf(stderr, "example: the library has interface %d, this program %d\n", miga_abi(), MIGA_ABI);
        return 1;
    }
    miga_run *run = miga_open(argv[1], argv[2]);
    if (run == nullptr) fail();
    if (argc == 5) {
        const int64_t count = pull(run, 0, std::atoll(argv[3]));
        std::thread(miga_cancel, run).join();
        pull(run, count, INT64_MAX);
        if (miga_save(run, argv[4]) != 0) fail();
        miga_close(run);
        run = miga_resume(argv[4], nullptr);
        if (run == nullptr) fail();
    }
    pull(run, info_of(run).first_frame, INT64_MAX);
    miga_close(run);
    return 0;
}
