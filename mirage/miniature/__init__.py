"""The paper in miniature: tiny helpful models of the real architectures, made safe in each way that it compares."""
