"""Head models: coefficients of identity and expression ↔ the 72 landmarks."""

from facesnap.heads.linear import Head, LinearHeadModel, euler_from_rotation, rotation_from_euler

__all__ = ["Head", "LinearHeadModel", "euler_from_rotation", "rotation_from_euler"]
