"""What the TFDS builders share: splits that are lists of records, prepared quietly at first use."""

import abc
from collections.abc import Iterable
import contextlib
import hashlib
import io
import os
from typing import Any, ClassVar

from absl import logging
import numpy as np
import tensorflow_datasets as tfds


def digest(files: Iterable[str | os.PathLike], *settings: Any) -> str:
  """12 hexadecimal digits of the files' contents and of settings, for a config's name."""
  whole = hashlib.sha256()
  for path in files:
    with open(path, "rb") as file:  # each by its own digest, or a record that moves to the next file would not show
      whole.update(hashlib.file_digest(file, "sha256").digest())
  whole.update(repr(settings).encode())
  return whole.hexdigest()[:12]


class RecordsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set whose splits are lists of records, kept in their order. A subclass has `FEATURES` and `splits`."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (TFDS's own form)
  FEATURES: ClassVar[dict[str, tfds.features.FeatureConnector]]

  @abc.abstractmethod
  def splits(self) -> dict[str, list[dict]]:
    """The records of each split, as `self.builder_config` wants them.

    Raises:
      ValueError: data that cannot serve; one line that names the file and the record.
    """

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(self.FEATURES)
    return tfds.core.DatasetInfo(
      builder=self, description=type(self).__doc__, features=features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: enumerate(records) for split, records in self.splits().items()}

  def _generate_examples(self):
    """Splits are given as generators in `_split_generators`."""
    return iter(())


def load(
  builder_class: type[RecordsBuilder], config: tfds.core.BuilderConfig, split: str, data_dir: str | None = None
) -> list[dict]:
  """The records of a split, in order, with text as str; prepares the data set (array_record) at first use.

  Args:
    data_dir: where prepared data sets are kept; None for TFDS's own folder.
  """
  tfds.disable_progress_bar()
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # TFDS warns of every config that is not in its own list
  try:
    builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
    if not builder.is_prepared():
      try:
        with contextlib.redirect_stdout(io.StringIO()):  # it also announces a download; there is none
          builder.download_and_prepare()
      except OSError:  # another run may have been quicker to rename its copy to the same place
        builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
          raise
    source = builder.as_data_source(split)
  finally:
    logging.set_verbosity(verbosity)
  records = source.__getitems__(range(len(source)))  # one read: record by record it takes three times as long
  return [{name: _plain(value) for name, value in record.items()} for record in records]


def _plain(value: Any) -> str | int | list:
  """A decoded feature as Python's own."""
  if isinstance(value, bytes):
    return value.decode()
  return [_plain(v) for v in value] if np.ndim(value) else int(value)
