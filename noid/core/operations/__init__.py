"""Operations: tables of steps that can be undone, how one is carried out, and what is known of it afterwards."""
