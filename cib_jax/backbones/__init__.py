"""The networks that turn an image into features; `registry` names them, `weights` loads what they learned elsewhere."""
