"""The measures by name: how each is shown, which way is better, and how it is defined."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """Heading, label, unit, digits after the point, which way is better ("" = neither), factor, definition."""

    group: str
    label: str
    unit: str
    digits: int
    better: str
    factor: float
    meaning: str

    def text(self, value: float | None) -> str:
        """A value as it is shown, without its unit."""
        return "–" if value is None else f"{value * self.factor:.{self.digits}f}"


_SAME, _TIME, _TRUTH = "Consistency, and motion beside it", "Along the video", "Against the embedded world's truth"
_LONG = "Long videos, in the terms of their papers"
MEASURES: dict[str, Measure] = {
    "consistency": Measure(_SAME, "consistency of features", "", 4, "higher", 1,
        "VBench's rule on one network's features, or on a descriptor without weights: mean over frames of "
        "(cosine to the previous frame + cosine to the first)/2"),
    "subject_consistency": Measure(_SAME, "subject consistency", "", 4, "higher", 1,
        "the same on the features given as `--subject-features` (DINO's ViT-B/16: VBench's subject "
        "consistency)"),
    "background_consistency": Measure(_SAME, "background consistency", "", 4, "higher", 1,
        "the same on the features given as `--background-features` (CLIP's ViT-B/32: VBench's background "
        "consistency)"),
    "motion": Measure(_SAME, "motion", "px/frame", 2, "", 1,
        "mean length of the optical flow, in pixels a frame of a picture with a short side of 256"),
    "motion_ratio": Measure(_SAME, "motion, last/first", "×", 2, "", 1,
        "motion in the last eighth over that in the first; below 1 it stagnates"),
    "frozen_share": Measure(_SAME, "frozen frames", "%", 1, "lower", 100,
        "share of successive frames that differ by less than 0.1 levels of 255 in the mean"),
    "flicker": Measure(_SAME, "temporal flicker, VBench's", "", 4, "higher", 1,
        "(255 − mean absolute difference of successive frames)/255; motion lowers it too"),
    "warping_error": Measure(_SAME, "warping error", "×10⁻³", 2, "lower", 1000,
        "mean squared RGB difference to the next frame moved back by the flow, where forward and backward "
        "flow agree"),
    "largest_jump": Measure(_SAME, "largest jump", "×", 2, "lower", 1,
        "largest difference of successive frames over the median one"),
    "seam_ratio": Measure(_SAME, "seams at block borders", "×", 3, "lower", 1,
        "difference of successive frames over that of the neighbouring pairs, at block borders against "
        "elsewhere; 1 = invisible"),
    "seam_p": Measure(_SAME, "seams, p-value", "", 3, "", 1,
        "share of random places for the borders at which the ratio is as large"),
    "latent_consistency": Measure(_SAME, "latent consistency", "", 4, "higher", 1,
        "the score of self-reflection on the VAE's latents: groups of 4 latent frames against the 8 before, "
        "mean"),
    "latent_consistency_min": Measure(_SAME, "latent consistency, lowest", "", 4, "higher", 1,
        "the lowest of the same"),
    "colour_overlap": Measure(_TIME, "colours kept, last/first", "", 3, "higher", 1,
        "intersection of the 8×8×8 RGB histograms of the first and the last eighth: colour drift, where low"),
    "luminance": Measure(_TIME, "luminance", "", 3, "", 1,
        "mean luma (BT.709) of [0, 1]"),
    "luminance_ratio": Measure(_TIME, "luminance, last/first", "×", 3, "", 1,
        "last eighth over first eighth; above 1 over-exposure"),
    "saturation": Measure(_TIME, "saturation", "", 3, "", 1,
        "mean of the largest minus the smallest channel, of [0, 1]"),
    "saturation_ratio": Measure(_TIME, "saturation, last/first", "×", 3, "", 1,
        "last eighth over first eighth; above 1 over-saturation"),
    "sharpness": Measure(_TIME, "sharpness", "", 0, "", 1,
        "variance of the Laplacian of the luma in levels; noise raises it"),
    "sharpness_ratio": Measure(_TIME, "sharpness, last/first", "×", 3, "", 1,
        "last eighth over first eighth"),
    "noise": Measure(_TIME, "noise", "levels", 2, "lower", 1,
        "standard deviation of white noise by Immerkær's mask (1996); fine texture raises it"),
    "noise_ratio": Measure(_TIME, "noise, last/first", "×", 3, "", 1,
        "last eighth over first eighth"),
    "hue_drift": Measure(_LONG, "hue drift, first/last 15 %", "°", 1, "lower", 1,
        "colour drift: earth mover's distance on the circle between the hues of the first and the last 15 % of the "
        "frames, weighted by chroma: by how many degrees a hue has turned in the mean (Delon, Rabin and Gousseau, JMIV "
        "2011); not told of grey"),
    "consistency_drift": Measure(_LONG, "appearance drift, first/last 15 %", "", 4, "lower", 1,
        "FramePack's start-end contrast (arXiv 2504.12626) of the consistency of features: its mean over the first "
        "15 % of the frames minus that over the last 15 %, without its sign"),
    "sharpness_drift": Measure(_LONG, "clarity drift, first/last 15 %", "", 0, "lower", 1,
        "the same of the sharpness, which noise raises"),
    "luminance_drift": Measure(_LONG, "exposure drift, first/last 15 %", "", 3, "lower", 1,
        "the same of the luminance"),
    "saturation_drift": Measure(_LONG, "saturation drift, first/last 15 %", "", 3, "lower", 1,
        "the same of the saturation"),
    "similarity_drop": Measure(_LONG, "largest drop of similarity", "", 4, "lower", 1,
        "1 minus the lowest cosine of a frame's features to the first frame's, of the network of the consistency"),
    "sink_collapse": Measure(_LONG, "sink collapse", "%", 1, "lower", 100,
        "LoL's Sink-Collapse (arXiv 2601.16914) of one video: largest fall, within 8 frames, of the root mean squared "
        "distance to the first frame, over the largest distance; 100 is suddenly the first frame again"),
    "returns": Measure(_LONG, "returns to the first frame", "", 0, "lower", 1,
        "how often that distance falls below a quarter of the largest after it was above a half"),
    "cuts": Measure(_LONG, "shot cuts", "", 0, "lower", 1,
        "pairs of successive frames that differ more than 8 times as much as the median of the 25 pairs around them"),
    "truth_subject_consistency": Measure(_TRUTH, "subject consistency", "", 4, "higher", 1,
        "VBench's rule on the world's classifier: its features of subject and colour"),
    "truth_background_consistency": Measure(_TRUTH, "background consistency", "", 4, "higher", 1,
        "the same, its features of terrain and time of day"),
    "truth_accuracy_subject": Measure(_TRUTH, "subject as asked", "%", 1, "higher", 100,
        "share of frames in which the classifier reads the prompt's subject, or, where that leaves it open, the "
        "subject of most of the first 12 frames"),
    "truth_accuracy_colour": Measure(_TRUTH, "colour as asked", "%", 1, "higher", 100,
        "the same for its colour"),
    "truth_accuracy_terrain": Measure(_TRUTH, "terrain as asked", "%", 1, "higher", 100,
        "the same for the terrain"),
    "truth_accuracy_time": Measure(_TRUTH, "time of day as asked", "%", 1, "higher", 100,
        "the same for the time of day"),
    "truth_hazard": Measure(_TRUTH, "hazard, losses/100 frames", "", 2, "lower", 1,
        "how often an attribute is lost: read as asked in 4 frames in a row, and then in 4 in a row not, per 100 "
        "frames in which it was there, over all four"),
    "truth_hazard_low": Measure(_TRUTH, "hazard, from", "", 2, "", 1,
        "lower end of its exact 95 % interval for Poisson events (Garwood 1936)"),
    "truth_hazard_high": Measure(_TRUTH, "hazard, to", "", 2, "", 1,
        "upper end of it"),
    "truth_colour_profile_distance": Measure(_TRUTH, "colours off the true world's", "", 4, "lower", 1,
        "mean absolute difference, of [0, 1], between the median colour of each row and the true scenes'"),
    "truth_colour_drift": Measure(_TRUTH, "drift of the rows' colours", "", 4, "lower", 1,
        "mean absolute difference of those medians between first and last eighth"),
    "truth_subject_jitter": Measure(_TRUTH, "subject's jitter", "px/frame²", 3, "lower", 1,
        "mean length of its acceleration, pixels of a picture 64 high"),
    "truth_scroll_speed": Measure(_TRUTH, "speed of the near hills", "px/frame", 3, "", 1,
        "median, pixels of a picture 64 high; 0.48 to 0.72 in the true world"),
    "truth_scroll_variation": Measure(_TRUTH, "variation of that speed", "%", 1, "lower", 100,
        "standard deviation over median"),
}  # fmt: skip
"""Every measure `measure` can return, in the order in which they are shown."""
