"""Saved ComfyUI workflows: reading both formats, and moving them from ComfyUI_ExtraModels."""

from .files import read_workflow, write_workflow
from .graph import WorkflowError
from .report import Move, Report, Row
from .upgrade import upgrade

__all__ = ["Move", "Report", "Row", "WorkflowError", "read_workflow", "upgrade", "write_workflow"]
