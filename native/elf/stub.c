/* Stands in for a libc when the opener is linked: the names it needs, and the name of the library as its
 * soname. */
void dlopen(void)
{
}
void dlerror(void)
{
}
void dlinfo(void)
{
}
void write(void)
{
}
void getpid(void)
{
}
void kill(void)
{
}
void __libc_start_main(void)
{
}
