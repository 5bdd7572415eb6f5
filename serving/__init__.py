"""What runs inside or starts tritonserver."""
