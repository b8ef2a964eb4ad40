/* A renderer that pulls frames and changes the prompt on the way: `make embed`, then
 *
 *     cc examples/live.c -Ibuild/embed -Lbuild/embed -lmiga_embed -Wl,-rpath,$PWD/build/embed -o live && ./live > live.rgb
 *     ffmpeg -f rawvideo -pixel_format rgb24 -video_size 96x64 -framerate 12 -i live.rgb live.mp4
 */
#include <stdio.h>
#include <stdlib.h>

#include "miga_embed.h"

static int fail(void) {
    fprintf(stderr, "live: %s\n", miga_last_error());
    return 1;
}

int main(void) {
    const char *options = "{\"prompt\": \"a red balloon over snowy hills at noon\", \"num_frames\": 85, "
                          "\"miga\": {\"warmup\": \"clip\"}}"; /* its first frames as soon as they are made */
    miga_run *run = miga_open("tiny", options);
    miga_video_info info;
    if (run == NULL || miga_get_info(run, &info) != 0) return fail();
    const size_t size = (size_t)info.width * info.height * 3;
    uint8_t *frame = malloc(size);
    if (frame == NULL) return 1;
    int answer;
    for (int number = 0; (answer = miga_next_frame(run, frame, size, 0)) == 1; ++number) {
        if (number == 12) {
            const char *how = "{\"blend\": 12, \"above\": 0.6}";
            if (miga_set_prompt(run, "a red balloon over snowy hills at night", how) != 0) return fail();
        }
        fwrite(frame, 1, size, stdout);
    }
    if (answer < 0 || miga_save(run, "live.session.safetensors") != 0) return fail();
    free(frame);
    miga_close(run);
    return 0;
}
