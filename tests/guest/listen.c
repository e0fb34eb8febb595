/* What sshd of a machine with a vsock does, without the encryption: listens on a vsock port, says something
 * to the first that connects, and prints what it hears.
 *
 *     listen PORT TEXT */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sockaddr_vm own = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
    char heard[256];
    ssize_t length;
    int listener, fd;

    if (argc != 3)
        return 2;
    own.svm_port = strtoul(argv[1], NULL, 10);
    listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&own, sizeof(own)) < 0 || listen(listener, 1) < 0) {
        perror("vsock");
        return 1;
    }
    puts("listening");
    fflush(stdout);
    fd = accept(listener, NULL, NULL);
    if (fd < 0 || write(fd, argv[2], strlen(argv[2])) < 0) {
        perror("accept");
        return 1;
    }
    while ((length = read(fd, heard, sizeof(heard))) > 0)
        fwrite(heard, 1, length, stdout);
    return length < 0;
}
