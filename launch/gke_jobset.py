"""Prints gke_jobset.yaml for a pod of yours: python launch/gke_jobset.py --name=... -- COMMAND... | kubectl apply -f -

The command runs once on each host of each slice; its workdir is a folder below /runs, which is the volume of --claim.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import string


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", required=True, help="of the JobSet")
  parser.add_argument("--image", required=True, help="a container image in which gfn_jax[tpu] is installed")
  parser.add_argument("--claim", required=True, help="PersistentVolumeClaim (ReadWriteMany), which becomes /runs")
  parser.add_argument("--accelerator", required=True, help="as tpu-v6e-slice: gke-tpu-accelerator of the node pool")
  parser.add_argument("--topology", required=True, help="of a slice, as 4x4")
  parser.add_argument("--chips", type=int, default=4, help="of a host [4]")
  parser.add_argument("--slices", type=int, default=1, help="[1]")
  parser.add_argument("--spot", action="store_true", help="on Spot nodes, which can be preempted")
  parser.add_argument("command", nargs="+", help="as: -- python -m gfn_jax.main --config=... --workdir=/runs/...")
  arguments = parser.parse_args(argv)
  sides = arguments.topology.split("x")
  if not all(side.isdecimal() and int(side) for side in sides):
    parser.error(f"--topology={arguments.topology!r} is not as 4x4 or 2x2x4")
  arguments.num_chips = math.prod(map(int, sides))
  if arguments.chips < 1 or arguments.num_chips % arguments.chips:
    parser.error(f"--chips={arguments.chips} a host do not divide the chips of --topology={arguments.topology}")
  if arguments.slices < 1:
    parser.error(f"--slices={arguments.slices} is less than 1")
  return arguments


def substitutions(arguments: argparse.Namespace) -> Mapping[str, str]:
  """What the names in the template stand for. JSON is YAML, quotes and all."""
  node_selector = {
    "cloud.google.com/gke-tpu-accelerator": arguments.accelerator,
    "cloud.google.com/gke-tpu-topology": arguments.topology,
  }
  if arguments.spot:
    node_selector["cloud.google.com/gke-spot"] = "true"
  values = {
    "name": arguments.name,
    "slices": arguments.slices,
    "hosts": arguments.num_chips // arguments.chips,
    "node_selector": node_selector,
    "image": arguments.image,
    "command": [word.replace("$", "$$") for word in arguments.command],  # Kubernetes reads $(NAME) as a variable
    "chips": arguments.chips,
    "claim": arguments.claim,
  }
  return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


if __name__ == "__main__":
  template = string.Template(pathlib.Path(__file__).with_suffix(".yaml").read_text())
  print(template.substitute(substitutions(parse())), end="")
