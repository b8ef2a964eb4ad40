/* The engine from C: open a video, pull its frames into buffers of the caller, save it, go on with it later.
 *
 * libmiga_embed.so hosts a Python interpreter, or uses the one the process has. An interpreter of its own starts at the
 * first miga_open or miga_resume, takes no notice of the host's PYTHON* variables, installs no signal handler, leaves
 * the locale alone and is never ended. It is that of the environment in MIGA_PYTHON (path of its python executable,
 * which must be of the Python version the library was built with), or of the environment that built the library. An
 * interpreter that the process started itself must be able to import miga_engine and must outlive every handle.
 *
 * Texts are UTF-8 and end with a zero byte; the library copies what it is given. No C++ or Python exception leaves it.
 *
 * Threads: every function may be called from any thread, with or without Python's lock held. Handles are independent:
 * two of them in two threads work at the same time. Calls with one handle go one after another, so use it in one
 * thread; only miga_cancel, miga_set_prompt, miga_set_guidance_scale and miga_last_error never wait for a frame. A
 * handle that was closed is refused, and never reused.
 */
#ifndef MIGA_EMBED_H
#define MIGA_EMBED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define MIGA_NOEXCEPT noexcept
#else
#define MIGA_NOEXCEPT
#endif

#define MIGA_API __attribute__((visibility("default")))

/* Number of this interface; it grows when a function or a structure below changes. */
#define MIGA_ABI 2

/* A video that is being made. */
typedef struct miga_run miga_run;

typedef struct {
    int32_t width;       /* pixels */
    int32_t height;      /* pixels */
    int32_t fps;         /* frames per second the video is meant for, rounded */
    int64_t num_frames;  /* of the whole video; -1 = endless */
    int64_t first_frame; /* number of the frame the handle gives first: 0, or where a session file goes on */
} miga_video_info;

/* MIGA_ABI of the library that was loaded; compare it with that of this header. Starts nothing. */
MIGA_API int miga_abi(void) MIGA_NOEXCEPT;

/* Version of the engine this library was built with, such as "0.1.0". Starts nothing. */
MIGA_API const char *miga_version(void) MIGA_NOEXCEPT;

/* Load a model and prepare a video; NULL and a sentence in miga_last_error where that cannot be.
 *
 * model: "tiny", a model folder, or a file inside one.
 * options: a JSON object. Only "prompt" is needed: a text, or a timeline {"0": text, "160": text} by first frame.
 *   num_frames absent or null = endless. docs/options.md says what each option is.
 *   Of the video: prompt, solver, num_inference_steps, shift, sigmas, denoising_steps, guidance_scale, eta,
 *     use_scale_array, num_frames, image, video, video_frames, seed, height, width, fps, guidance, guidance_scale_end,
 *     guidance_scale_low, negative_prompt, method.
 *   Of the method, in an object of the name miga: zigzag_width, passes_per_advance, stage2_steps, refine_steps,
 *     guidance_frames, guidance_offset, guidance_spacing, guidance_anchor, anchor_frames, reference_sigma, stride,
 *     tail_signal, history_guidance, moving_phase, commit, commit_offset, past_context, window_order, window_batch,
 *     warmup, self_reflection, score_drop, judge_step, reference_groups, candidates, search_baseline, judge, channels,
 *     prompt_blend_frames.
 *   Of the model: device, dtype, transformer, transformer_2, vae, text_encoder, tokenizer, lora, decoder, experts,
 *     download, revision, cache_dir, preset, attention, vae_dtype, compile, capture.
 *   Of the stream: overlap_decode, stop_on_drift, warn_on_drift.
 *   All mean what they mean in miga_engine.Engine.from_pretrained and Engine.stream; others are refused.
 */
MIGA_API miga_run *miga_open(const char *model, const char *options) MIGA_NOEXCEPT;

/* Go on with a video from a session file: its first frame is the one after the last that was given before miga_save.
 *
 * options: a JSON object or NULL: "num_frames" for a longer video, where its end had not begun to shape the frames when
 *   it was saved; "model" where the model neither lies beside or below the session file nor was opened by this process
 *   before; and those of the model and the stream of miga_open. What is left out is as the file records it.
 */
MIGA_API miga_run *miga_resume(const char *path, const char *options) MIGA_NOEXCEPT;

/* The video of a session file once more, from its first frame to the last that was given before miga_save: with all that
 * it was told while it ran, at the same moments, bit for bit.
 *
 * options: as of miga_resume, without num_frames; "image" or "video" where it began with one.
 */
MIGA_API miga_run *miga_replay(const char *path, const char *options) MIGA_NOEXCEPT;

/* 0 and *info filled, or -1. */
MIGA_API int miga_get_info(miga_run *run, miga_video_info *info) MIGA_NOEXCEPT;

/* The next frame, into memory of the caller on the CPU: rows from top to bottom, pixels of three bytes R, G, B.
 *
 * capacity: bytes that may be written; row_bytes: from the start of a row to that of the next, 0 = 3 * width. The last
 * row needs no padding, and padding is never written. Waits while the frame is being made, without Python's lock.
 * 1: a frame was written. 0: the video has ended, by its length or by miga_cancel. -1: an error; of a wrong argument
 * the same frame can be asked for again, any other ends the video and is repeated by every later call.
 */
MIGA_API int miga_next_frame(miga_run *run, uint8_t *frame, size_t capacity, size_t row_bytes) MIGA_NOEXCEPT;

/* End the video soon: no new pass is begun, frames already made still come, then 0. Never waits. */
MIGA_API void miga_cancel(miga_run *run) MIGA_NOEXCEPT;

/* Change what the video shows while it runs; 0, or -1 for what cannot be asked for. It is taken up before the next pass,
 * and sessions record it. From any thread.
 *
 * options: a JSON object or NULL: "at": the video frame from which on, or "now" (without it); "blend": video frames over
 *   which the text runs from the old prompt to the new one; "above": noise level sigma, 0 to 1, from which on frames that
 *   are being made take it at once; "restart": true grows the queue anew. docs/live.md says what each costs.
 */
MIGA_API int miga_set_prompt(miga_run *run, const char *prompt, const char *options) MIGA_NOEXCEPT;

/* Change the scale of guidance while the video runs; options: "at", as of miga_set_prompt. 0 or -1. */
MIGA_API int miga_set_guidance_scale(miga_run *run, double guidance_scale, const char *options) MIGA_NOEXCEPT;

/* Write what the video needs to go on after the last frame given, to a file named something.safetensors, which is
 * replaced whole or not at all; 0 or -1. */
MIGA_API int miga_save(miga_run *run, const char *path) MIGA_NOEXCEPT;

/* Stop after the pass at hand and release the model and everything the video held. NULL is allowed. */
MIGA_API void miga_close(miga_run *run) MIGA_NOEXCEPT;

/* Why the last call in this thread that failed did so, in one sentence; "" where none has. Valid until the next failure
 * in this thread. */
MIGA_API const char *miga_last_error(void) MIGA_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif
