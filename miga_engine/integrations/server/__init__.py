"""Videos over HTTP: a queue of jobs on disk, workers on one engine, OpenAI's routes for videos, and a page."""
