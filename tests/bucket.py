"""A bucket on the loopback: `python bucket.py` prints its port and serves gs://runs until it is killed."""

import sys

from gcp_storage_emulator.handlers import objects

_download = objects.download


def download(request, response, storage, *args, **kwargs):
  """As the emulator's, with the generation that Cloud Storage sends along and TensorStore goes by."""
  _download(request, response, storage, *args, **kwargs)
  if response.status.value < 300:
    found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
    response["x-goog-generation"] = found["generation"]


if __name__ == "__main__":
  objects.download = download  # before the server makes its routes
  from gcp_storage_emulator.server import create_server

  server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
  server.start()
  print(server._api._httpd.socket.getsockname()[1], flush=True)
  sys.stdin.read()  # until whoever started it ends
  server.stop()
