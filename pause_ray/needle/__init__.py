"""Questions hidden in haystacks, asked, graded and kept."""
