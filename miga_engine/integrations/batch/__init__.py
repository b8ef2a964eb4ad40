"""Many videos, by processes of this machine or on a Ray cluster: `miga batch`."""
