"""Steps as other tools' folders, and back: safetensors, Hugging Face's layout, torch.distributed.checkpoint.

What each format carries, and how to open it with which tool: docs/interchange.md. The command's verbs `export` and
`import` call these functions.
"""

from safepoint.interchange._export import ExportFormat, ExportInfo, export_step
from safepoint.interchange._import import ImportFormat, ImportInfo, import_aws, import_folder, import_stored

__all__ = [
    "ExportFormat",
    "ExportInfo",
    "ImportFormat",
    "ImportInfo",
    "export_step",
    "import_aws",
    "import_folder",
    "import_stored",
]
