"""Run:ai model streamer: its own reader threads into its own buffers, tensors handed to the caller to keep (owned)."""

from runai_model_streamer import SafetensorsStreamer


def load(paths):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        return dict(streamer.get_tensors())
