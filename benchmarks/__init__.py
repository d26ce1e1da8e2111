"""What conversion costs in output quality, time and memory."""
