"""One rank of a torch job that test_convert_sharded.py launches: `torch_worker.py RANK COUNT PORT DIRECTORY`. No test of its own."""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

PLACES = {  # key: shape, dtype, how it lies on three ranks
    "model.embed_tokens.weight": ((10, 6), torch.float32, Shard(0)),  # 4, 4 and 2 rows
    "model.layers.0.mlp.up_proj.weight": ((8, 12), torch.bfloat16, Shard(1)),
    "model.layers.0.thin.weight": ((2, 3), torch.float32, Shard(0)),  # nothing on the third
    "model.norm.weight": ((5,), torch.float32, Replicate()),
    "lm_head.weight": ((6, 7), torch.float16, None),
    "scale": ((), torch.float32, None),
}
NUMBERS = {key: 1 + ("layers" in key) for key in PLACES}


def full():
    torch.manual_seed(0)
    return {key: torch.randn(shape).to(dtype) for key, (shape, dtype, _) in PLACES.items()}


def main(rank, count, port, directory):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, RANK=rank, WORLD_SIZE=count)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (int(count),))
    place = lambda key, tensor: tensor if PLACES[key][2] is None else distribute_tensor(tensor, mesh, [PLACES[key][2]])
    state = {key: place(key, tensor) for key, tensor in full().items()}
    writers = {
        "parts": {"save_distributed": True, "fqn_to_index_mapping": NUMBERS},
        "one": {"save_distributed": True},
        "consolidated": {"save_distributed": True, "enable_consolidation": True, "fqn_to_index_mapping": NUMBERS},
    }
    for name, options in writers.items():
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(f"{directory}/{name}", **options))
    empty = {key: place(key, torch.zeros_like(tensor)) for key, tensor in full().items()}
    dcp.load(empty, storage_reader=HuggingFaceStorageReader(f"{directory}/ours"))
    for key, tensor in state.items():
        whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
        assert torch.equal(whole(empty[key]), whole(tensor)), key
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
