"""Weight files: reading, writing, naming what they hold, and converting between layouts."""

from .convert import convert_state_dict
from .detect import detect_config
from .identify import identify
from .read import Checkpoint, CheckpointError, read_checkpoint
from .write import sha256_file, write_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "convert_state_dict", "detect_config", "identify",
           "read_checkpoint", "sha256_file", "write_checkpoint"]
