"""One module per gate mode, each with its `MODE`. `raymoe.gate_modes` finds them and says how to add one."""
