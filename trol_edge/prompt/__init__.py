"""From text and pictures to what the graphs take: token ids and pixels."""
