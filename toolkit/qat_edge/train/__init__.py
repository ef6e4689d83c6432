"""What only `finetune` is made of: before the first step, the two phases, and the border between them."""
